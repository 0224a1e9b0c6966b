// Vectors of AVX-512, and how codes come out of them. Included after a pragma that names the instructions.
#pragma once
#include <immintrin.h>

namespace {

constexpr int VECTOR = 64;
using Vec = __m512i;

inline Vec load(const int8_t *p) { return _mm512_loadu_si512(p); }

inline Vec load(const uint8_t *p, int64_t left) {
    return left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((1ull << left) - 1, p);
}

// High bits: each byte's eight become the low four bits of two bytes, one for each byte of codes. Above them is rubbish.
inline Vec load_high(const uint8_t *p, int64_t left) {
    const __m512i b = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(load(p, left < 32 ? left : 32)));
    return _mm512_or_si512(b, _mm512_slli_epi16(b, 4));
}

inline Vec join_high(Vec code, Vec high, int k) {
    const __m512i bit = k > 2 ? _mm512_srli_epi16(high, 1) : _mm512_slli_epi16(high, 2 - k);
    return _mm512_or_si512(code, _mm512_and_si512(bit, _mm512_set1_epi8(4)));
}

template <int FIELDS>
inline Vec field(Vec packed, int k) {
    return _mm512_and_si512(_mm512_srli_epi16(packed, 8 / FIELDS * k), _mm512_set1_epi8((1 << 8 / FIELDS) - 1));
}

// The code where it lies: times 2^(8 / FIELDS k).
template <int FIELDS>
inline Vec masked(Vec packed, int k) {
    return _mm512_and_si512(packed, _mm512_set1_epi8(static_cast<char>(((1 << 8 / FIELDS) - 1) << 8 / FIELDS * k)));
}

}  // namespace
