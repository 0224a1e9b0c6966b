// Any processor: vectors as GCC and Clang have them everywhere, in whatever registers there are.
#include "backend.h"

namespace {

constexpr int VECTOR = 8, ROWS = 2, TILE_ROWS = 1, TILE = 2, LANES = 4;
typedef int8_t Bytes __attribute__((vector_size(8)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(8)));
typedef int16_t Vec __attribute__((vector_size(16)));
typedef int32_t Wide __attribute__((vector_size(32)));
struct Sum {
    Vec half;
    Wide full;
};

inline Vec load(const int8_t *p) {
    Bytes b;
    __builtin_memcpy(&b, p, 8);
    return __builtin_convertvector(b, Vec);
}

inline Vec load(const uint8_t *p, int64_t) {  // a row is a multiple of 8 bytes
    UnsignedBytes b;
    __builtin_memcpy(&b, p, 8);
    return __builtin_convertvector(b, Vec);
}

// High bits: each byte's eight are four for each of two bytes of codes.
inline Vec load_high(const uint8_t *p, int64_t) {
    uint8_t spread[8];
    for (int i = 0; i < 4; i++) {
        spread[2 * i] = p[i];
        spread[2 * i + 1] = p[i] >> 4;
    }
    return load(spread, 8);
}

inline Vec join_high(Vec code, Vec high, int k) { return code | (high >> k & 1) << 2; }

template <int FIELDS>
inline Vec field(Vec packed, int k) {
    return packed >> 8 / FIELDS * k & static_cast<int16_t>((1 << 8 / FIELDS) - 1);
}

// A vector of codes adds at most 15 * 128 in each of 2 fields (4 bits), or 7 * 128 in each of 4 (3 bits): 16 bits hold
// eight such sums.
inline void multiply_add(Sum &sum, Vec code, Vec digit) { sum.half += code * digit; }

inline void widen(Sum &sum) {
    sum.full += __builtin_convertvector(sum.half, Wide);
    sum.half = Vec{};
}

template <int R, int T>
inline void flush(Sum (&acc)[R][T][2], int64_t at) {
    if (at / VECTOR % 8 == 7)
        UNROLLED for (int r = 0; r < R; r++)
            UNROLLED for (int t = 0; t < T; t++)
                UNROLLED for (int d = 0; d < 2; d++) widen(acc[r][t][d]);
}

inline int64_t total(Sum sum) {
    widen(sum);
    int64_t s = 0;
    for (int i = 0; i < VECTOR; i++) s += sum.full[i];
    return s;
}

inline int64_t total(Sum low, Sum high) { return total(low) + 256 * total(high); }

}  // namespace

#include "multiply.inc"

const Backend portable_backend = {"portable", VECTOR, quantize, arrange, multiply, scale, product, swiglu, attend, [] { return true; }};
