// 64-bit Arm with the dot product of ARMv8.2: 16 products of a code and a digit, summed up in 32 bits.
#include "backend.h"

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace {

constexpr int VECTOR = 16, ROWS = 4, TILE_ROWS = 2, TILE = 4, LANES = 4;
using Vec = int8x16_t;
using Sum = int32x4_t;

inline Vec load(const int8_t *p) { return vld1q_s8(p); }

inline Vec load(const uint8_t *p, int64_t left) {
    if (left >= 16) return vreinterpretq_s8_u8(vld1q_u8(p));
    uint8_t padded[16] = {};
    __builtin_memcpy(padded, p, left);
    return vreinterpretq_s8_u8(vld1q_u8(padded));
}

// High bits: each byte's eight become the low four bits of two bytes, one for each byte of codes. Above them is rubbish.
inline Vec load_high(const uint8_t *p, int64_t left) {
    uint8_t padded[8] = {};
    if (left < 8) p = static_cast<const uint8_t *>(__builtin_memcpy(padded, p, left));
    const uint8x8_t b = vld1_u8(p);
    return vreinterpretq_s8_u8(vcombine_u8(vzip1_u8(b, vshr_n_u8(b, 4)), vzip2_u8(b, vshr_n_u8(b, 4))));
}

inline Vec join_high(Vec code, Vec high, int k) {
    const uint8x16_t bit = vshlq_u8(vreinterpretq_u8_s8(high), vdupq_n_s8(2 - k));
    return vorrq_s8(code, vreinterpretq_s8_u8(vandq_u8(bit, vdupq_n_u8(4))));
}

template <int FIELDS>
inline Vec field(Vec packed, int k) {
    const uint8x16_t shifted = vshlq_u8(vreinterpretq_u8_s8(packed), vdupq_n_s8(-8 / FIELDS * k));
    return vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8((1 << 8 / FIELDS) - 1)));
}

inline void multiply_add(Sum &sum, Vec code, Vec digit) { sum = vdotq_s32(sum, code, digit); }

template <int R, int T>
inline void flush(Sum (&)[R][T][2], int64_t) {}

inline int64_t total(Sum sum) { return vaddvq_s32(sum); }

inline int64_t total(Sum low, Sum high) { return total(low) + 256 * total(high); }

}  // namespace

#include "multiply.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif

static bool runs_here() {
#if defined(__APPLE__)
    return true;  // every Mac with an Arm processor has it
#elif defined(__linux__)
    return getauxval(AT_HWCAP) & (1 << 20);  // HWCAP_ASIMDDP
#else
    return false;
#endif
}

const Backend neon_backend = {"neon", VECTOR, quantize, arrange, multiply, scale, product, swiglu, attend, runs_here};
#else
const Backend neon_backend = {"neon", 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, [] { return false; }};
#endif
