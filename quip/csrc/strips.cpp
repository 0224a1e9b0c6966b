// Strips for AMX: activations as columns and back, and in the order of a permutation.
#include "backend.h"
#include "prompt.h"

#if defined(HAS_AMX)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

#include "tiles.h"

void amx_bring(const uint16_t *x, int64_t n, int64_t count, uint16_t *columns) {
    for (int64_t j = 0; j < n; j += 32, columns += 32 * STRIP) {
        const int64_t some = n - j < 32 ? n - j : 32;
        const __mmask32 valid = some == 32 ? ~0u : (1u << some) - 1;
        __m512i v[16] = {};
        for (int64_t t = 0; t < count; t++) v[t] = _mm512_maskz_loadu_epi16(valid, x + t * n + j);
        transpose(v);
        int64_t i = 0;
        for (; i + 1 < some; i += 2) _mm512_storeu_si512(columns + i * STRIP, separate(v[i / 2]));
        if (i < some) put(columns + i * STRIP, _mm512_castsi512_si256(separate(v[i / 2])));
    }
}

void amx_take(const uint16_t *columns, int64_t m, int64_t count, uint16_t *y) {
    for (int64_t j = 0; j < m; j += 32, columns += 32 * STRIP) {
        const int64_t some = m - j < 32 ? m - j : 32;
        const __mmask32 valid = some == 32 ? ~0u : (1u << some) - 1;
        __m512i v[16] = {};
        int64_t i = 0;
        for (; i + 1 < some; i += 2) v[i / 2] = interleave(_mm512_loadu_si512(columns + i * STRIP));
        if (i < some) v[i / 2] = interleave(_mm512_zextsi256_si512(half(columns + i * STRIP)));
        transpose(v);
        for (int64_t t = 0; t < count; t++) _mm512_mask_storeu_epi16(y + t * m + j, valid, v[t]);
    }
}

void amx_gather(const uint16_t *from, const int64_t *perm, const float *divisor, int64_t n, uint16_t *to) {
    for (int64_t i = 0; i < n; i++) {
        const int64_t j = perm ? perm[i] : i;
        const __m256i v = half(from + j * STRIP);
        put(to + i * STRIP, divisor ? narrow(_mm512_div_ps(widen(v), _mm512_set1_ps(divisor[j]))) : v);
    }
}

void amx_scatter(const uint16_t *from, const int64_t *perm, const float *factor, const float *bias, int64_t m, uint16_t *to) {
    for (int64_t i = 0; i < m; i++) {
        const int64_t j = perm ? perm[i] : i;
        __m256i v = half(from + i * STRIP);
        if (factor) v = narrow(_mm512_mul_ps(widen(v), _mm512_set1_ps(factor[j])));
        if (bias) v = narrow(_mm512_add_ps(widen(v), _mm512_set1_ps(bias[j])));
        put(to + j * STRIP, v);
    }
}

void amx_place(const uint16_t *columns, const int64_t *perm, int64_t m, int64_t count, uint16_t *W, int64_t n) {
    const __mmask16 valid = static_cast<__mmask16>((1u << count) - 1);
    for (int64_t i = 0; i < m; i++)
        _mm256_mask_storeu_epi16(W + (perm ? perm[i] : i) * n, valid, half(columns + i * STRIP));
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif
#endif
