// AVX2: 32 products of a code and a digit, added up in pairs of 16 bits, and from time to time in 32.
#include "backend.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace {

constexpr int VECTOR = 32, ROWS = 2, TILE_ROWS = 1, TILE = 2, LANES = 8;
using Vec = __m256i;
struct Sum {
    __m256i half, full;  // 16 lanes of 16 bits, 8 lanes of 32
};

inline Vec load(const int8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }

inline Vec load(const uint8_t *p, int64_t left) {
    if (left >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    uint8_t padded[32] = {};
    __builtin_memcpy(padded, p, left);
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(padded));
}

// High bits: each byte's eight become the low four bits of two bytes, one for each byte of codes. Above them is rubbish.
inline Vec load_high(const uint8_t *p, int64_t left) {
    uint8_t padded[16] = {};
    if (left < 16) p = static_cast<const uint8_t *>(__builtin_memcpy(padded, p, left));
    const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return _mm256_or_si256(b, _mm256_slli_epi16(b, 4));
}

inline Vec join_high(Vec code, Vec high, int k) {
    const __m256i bit = k > 2 ? _mm256_srli_epi16(high, 1) : _mm256_slli_epi16(high, 2 - k);
    return _mm256_or_si256(code, _mm256_and_si256(bit, _mm256_set1_epi8(4)));
}

template <int FIELDS>
inline Vec field(Vec packed, int k) {
    return _mm256_and_si256(_mm256_srli_epi16(packed, 8 / FIELDS * k), _mm256_set1_epi8((1 << 8 / FIELDS) - 1));
}

// A pair adds at most 2 * 15 * 128 in each of 2 fields (4 bits), or 2 * 7 * 128 in each of 4 (3 bits): at most 7680 in
// all, so that 16 bits hold four vectors of codes.
inline void multiply_add(Sum &sum, Vec code, Vec digit) {
    sum.half = _mm256_add_epi16(sum.half, _mm256_maddubs_epi16(code, digit));
}

inline void widen(Sum &sum) {
    sum.full = _mm256_add_epi32(sum.full, _mm256_madd_epi16(sum.half, _mm256_set1_epi16(1)));
    sum.half = _mm256_setzero_si256();
}

template <int R, int T>
inline void flush(Sum (&acc)[R][T][2], int64_t at) {
    if (at / VECTOR % 4 == 3)
        UNROLLED for (int r = 0; r < R; r++)
            UNROLLED for (int t = 0; t < T; t++)
                UNROLLED for (int d = 0; d < 2; d++) widen(acc[r][t][d]);
}

inline int64_t total(Sum sum) {
    widen(sum);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum.full), _mm256_extracti128_si256(sum.full, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
    return _mm_cvtsi128_si32(s);
}

inline int64_t total(Sum low, Sum high) { return total(low) + 256 * total(high); }

}  // namespace

#include "multiply.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif

static bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

const Backend avx2_backend = {"avx2", VECTOR, quantize, arrange, multiply, scale, product, swiglu, attend, runs_here};
#else
const Backend avx2_backend = {"avx2", 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, [] { return false; }};
#endif
