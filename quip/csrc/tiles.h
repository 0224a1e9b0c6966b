// Strips of bfloat16 in vectors. From here to tiles_end.h, functions are compiled for a processor with AMX: what else a file
// includes comes before.
#pragma once
#include <immintrin.h>

#include <algorithm>

#include "backend.h"
#include "prompt.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

#include "amx.h"

namespace {

inline __m512i pair(const uint16_t *p) { return _mm512_loadu_si512(p); }

inline void put(uint16_t *p, __m512i v) { _mm512_storeu_si512(p, v); }

// a0 b0 a1 b1 ... of a and b, which are the halves of a vector; and back
inline __m512i interleave(__m512i halves) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
}

inline __m512i separate(__m512i pairs) {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22,
                                           20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_epi16(order, pairs);
}

inline __m512i interleave(__m256i a, __m256i b) {
    return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

inline __m512i narrow(__m512 a, __m512 b) { return interleave(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a))); }

// Of two vectors of 32 bits: the lower halves of both, the upper halves of both, the lower of one and the upper of the other.
inline __m512i mixed(__m512i a, __m512i b) { return _mm512_mask_blend_epi16(0xAAAAAAAA, a, b); }
inline __m512i lower(__m512i a, __m512i b) { return mixed(a, _mm512_slli_epi32(b, 16)); }
inline __m512i upper(__m512i a, __m512i b) { return mixed(_mm512_srli_epi32(a, 16), b); }

// Where column c of a strip begins: every other number from there on.
inline int64_t place(int64_t c) { return c / 2 * 32 + c % 2; }

// Columns c and d as a pair; and column c in 32 bits.
inline __m512i pair_of(const uint16_t *strip, int64_t c, int64_t d) {
    return mixed(pair(strip + place(c)), pair(strip + place(d) - 1));
}

inline __m512 wide(const uint16_t *strip, int64_t c) {
    const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    return _mm512_castsi512_ps(_mm512_and_si512(pair(strip + place(c) - 1), upper_half));
}

// Row i of a tile of sums.
inline __m512 row(const float *sums, int64_t i) { return _mm512_load_ps(sums + 16 * i); }

// What has been stored is in memory when tiles are loaded from there: compilers do not know that these read it.
inline void published() { __asm__ volatile("" : : : "memory"); }

// All tiles with 16 rows of 64 bytes.
inline void whole_tiles() {
    Shapes s;
    for (int i = 0; i < 8; i++) s.bytes[i] = 64, s.rows[i] = 16;
    shape(s);
}

}  // namespace
