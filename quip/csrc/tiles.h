// Vectors and tiles of bfloat16. Included after a pragma that names the instructions.
#pragma once
#include "amx.h"
#include "prompt.h"

namespace {

inline __m256i half(const uint16_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }

inline void put(uint16_t *p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), v); }

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

inline __m256i narrow(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }

inline __m512i narrow(__m512 a, __m512 b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }  // a, then b

// a0 b0 a1 b1 ... of the columns a and b, which are the halves of a vector; and back
inline __m512i interleave(__m512i columns) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, columns);
}

inline __m512i separate(__m512i pairs) {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22,
                                           20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_epi16(order, pairs);
}

inline __m512i interleave(__m256i a, __m256i b) {
    return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

// `count` columns X as pairs: what a tile takes on the right; zeros fill up `steps` tiles.
inline void pair_up(const uint16_t *X, int64_t count, int64_t steps, uint16_t *b) {
    int64_t k = 0;
    for (; k + 1 < count; k += 2) _mm512_store_si512(b + k * STRIP, interleave(_mm512_loadu_si512(X + k * STRIP)));
    if (k < count) _mm512_store_si512(b + k * STRIP, interleave(_mm512_zextsi256_si512(half(X + k * STRIP)))), k += 2;
    for (; k < 32 * steps; k += 2) _mm512_store_si512(b + k * STRIP, _mm512_setzero_si512());
}

// All tiles with 16 rows of 64 bytes.
void whole_tiles() {
    Shapes s;
    for (int i = 0; i < 8; i++) s.bytes[i] = 64, s.rows[i] = 16;
    shape(s);
}

}  // namespace
