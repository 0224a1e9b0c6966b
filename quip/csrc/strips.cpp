// Strips for AMX: activations as pairs of columns and back, in the order of a permutation, and as columns of a matrix.
#include "backend.h"
#include "prompt.h"

#if defined(HAS_AMX)
#include "tiles.h"

void amx_bring(const uint16_t *x, int64_t n, int64_t count, uint16_t *strip) {
    for (int64_t j = 0; j < n; j += 32, strip += 32 * STRIP) {
        const int64_t some = std::min<int64_t>(n - j, 32);
        const __mmask32 valid = some == 32 ? ~0u : (1u << some) - 1;
        __m512i v[16] = {};
        for (int64_t t = 0; t < count; t++) v[t] = _mm512_maskz_loadu_epi16(valid, x + t * n + j);
        transpose(v);
        for (int64_t i = 0; i < some; i += 2) put(strip + i * STRIP, v[i / 2]);
    }
}

void amx_take(const uint16_t *strip, int64_t m, int64_t count, uint16_t *y) {
    for (int64_t j = 0; j < m; j += 32, strip += 32 * STRIP) {
        const int64_t some = std::min<int64_t>(m - j, 32);
        const __mmask32 valid = some == 32 ? ~0u : (1u << some) - 1;
        __m512i v[16] = {};
        for (int64_t i = 0; i < some; i += 2) v[i / 2] = pair(strip + i * STRIP);
        transpose(v);
        for (int64_t t = 0; t < count; t++) _mm512_mask_storeu_epi16(y + t * m + j, valid, v[t]);
    }
}

void amx_gather(const uint16_t *from, const int64_t *perm, const float *factor, const float *bias, int64_t n, uint16_t *to) {
    const auto source = [&](int64_t i) { return perm ? perm[i] : i; };
    const auto number = [&](int64_t i) {
        const __m512 v = factor ? _mm512_mul_ps(wide(from, source(i)), _mm512_set1_ps(factor[i])) : wide(from, source(i));
        return bias ? _mm512_add_ps(v, _mm512_set1_ps(bias[i])) : v;
    };
    int64_t i = 0;
    if (factor || bias)
        for (; i + 1 < n; i += 2) put(to + i * STRIP, narrow(number(i), number(i + 1)));
    for (; i + 1 < n; i += 2) put(to + i * STRIP, pair_of(from, source(i), source(i + 1)));
    if (i < n) put(to + i * STRIP, narrow(number(i), _mm512_setzero_ps()));
}

void amx_clear(uint16_t *strip, int64_t first, int64_t last) {
    for (int64_t i = (first + 1) / 2 * 2; i < last; i += 2) put(strip + i * STRIP, _mm512_setzero_si512());
}

void amx_place(const uint16_t *strip, const int64_t *perm, int64_t m, int64_t count, uint16_t *W, int64_t n) {
    const __mmask16 valid = static_cast<__mmask16>((1u << count) - 1);
    for (int64_t i = 0; i < m; i += 2) {
        const __m512i two = separate(pair(strip + i * STRIP));
        _mm256_mask_storeu_epi16(W + (perm ? perm[i] : i) * n, valid, _mm512_castsi512_si256(two));
        if (i + 1 < m) _mm256_mask_storeu_epi16(W + (perm ? perm[i + 1] : i + 1) * n, valid, _mm512_extracti64x4_epi64(two, 1));
    }
}

#include "tiles_end.h"
#endif
