// Both products of a transform on a strip, with AMX.
#include "backend.h"
#include "prompt.h"

#if defined(HAS_AMX)
#include <immintrin.h>

#include <algorithm>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

#include "tiles.h"

namespace {

// A block of 16 rows of a factor times the columns in b and c, to tiles A and B.
#define TIMES_BOTH(NAME, A, B)                                                                          \
    inline void NAME(const uint16_t *tiles, int64_t steps, const uint16_t *b, const uint16_t *c) {      \
        _tile_zero(A);                                                                                  \
        _tile_zero(B);                                                                                  \
        for (int64_t k = 0; k < steps; k++, tiles += 1024, b += 512, c += 512) {                        \
            _tile_loadd(4, b, 64);                                                                      \
            _tile_loadd(5, c, 64);                                                                      \
            _tile_loadd(6, tiles, 64);                                                                  \
            _tile_dpbf16ps(A, 6, 4);                                                                    \
            _tile_dpbf16ps(B, 6, 5);                                                                    \
            _tile_loadd(7, tiles + 512, 64);                                                            \
            _tile_dpbf16ps(A, 7, 4);                                                                    \
            _tile_dpbf16ps(B, 7, 5);                                                                    \
        }                                                                                               \
    }
TIMES_BOTH(times_even, 0, 1)
TIMES_BOTH(times_odd, 2, 3)

#define STORE_BOTH(NAME, A, B)                    \
    inline void NAME(float *first, float *second) { \
        _tile_stored(A, first, 64);               \
        _tile_stored(B, second, 64);              \
    }
STORE_BOTH(store_even, 0, 1)
STORE_BOTH(store_odd, 2, 3)

// A factor times the columns in b and those in c, in 32 bits. A block is stored when the next is on its way.
void times(const Factor &f, const uint16_t *b, const uint16_t *c, float *first, float *second) {
    const int64_t next = f.steps * 1024;
    for (int64_t r = 0; r < f.blocks; r += 2) {
        times_even(f.tiles + r * next, f.steps, b, c);
        if (r) store_odd(first + (r - 1) * 256, second + (r - 1) * 256);
        if (r + 1 < f.blocks) times_odd(f.tiles + (r + 1) * next, f.steps, b, c);
        store_even(first + r * 256, second + r * 256);
    }
    if (f.blocks % 2 == 0) store_odd(first + (f.blocks - 1) * 256, second + (f.blocks - 1) * 256);
}

inline __m512 row(const float *sums, int64_t i) { return _mm512_load_ps(sums + 16 * i); }

}  // namespace

// From one row of pairs to the next: a line of the cache more than it takes, since at a power of two all would share a
// few places of the smallest cache.
inline int64_t padded(const Factor &L) { return L.steps * 512 + 32; }

int64_t amx_spare(const Factor &L, const Factor &R) {
    const int64_t blocks = std::max(L.blocks, R.blocks);
    return 8 * blocks * 256 + 4 * R.steps * 512 + R.rows * padded(L);
}

// Two at a time, in a pipeline: while some are multiplied, those after them become pairs, and those before them 16 bits.
// So tiles and vectors work at once, and nothing is loaded as a tile when it has just been stored, which would have to wait.
// An odd one out is its own neighbour, and what comes of that meets a zero of L or is not looked at.
void amx_kronecker(const Factor &L, const Factor &R, uint16_t *X, uint16_t *spare) {
    const int64_t p = L.rows, q = R.rows, deep = padded(L), room = 256 * std::max(L.blocks, R.blocks);
    float *out = reinterpret_cast<float *>(spare);
    uint16_t *b = spare + 8 * room, *Y = b + 4 * R.steps * 512;
    const auto sums = [&](int64_t i) { return out + i % 4 * room; };
    const auto pairs = [&](int64_t i) { return b + i % 4 * R.steps * 512; };
    whole_tiles();
    for (int64_t i = 0; i < p + 4; i += 2) {
        if (i < p) pair_up(X + i * q * STRIP, q, R.steps, pairs(i));
        if (i < p) pair_up(X + std::min(i + 1, p - 1) * q * STRIP, q, R.steps, pairs(i + 1));
        if (i >= 2 && i < p + 2) times(R, pairs(i - 2), pairs(i - 1), sums(i - 2), sums(i - 1));
        if (i >= 4)
            for (int64_t j = 0; j < q; j++)
                _mm512_store_si512(Y + j * deep + (i - 4) * STRIP, interleave(narrow(row(sums(i - 4), j), row(sums(i - 3), j))));
    }
    for (int64_t i = (p + 1) / 2 * 2; i < 32 * L.steps; i += 2)
        for (int64_t j = 0; j < q; j++) _mm512_store_si512(Y + j * deep + i * STRIP, _mm512_setzero_si512());
    for (int64_t j = 0; j < q + 2; j += 2) {
        if (j < q) times(L, Y + j * deep, Y + std::min(j + 1, q - 1) * deep, sums(j), sums(j + 1));
        if (j >= 2)
            for (int64_t i = 0; i < p; i++) {
                const __m512i two = narrow(row(sums(j - 2), i), row(sums(j - 1), i));
                uint16_t *to = X + (i * q + j - 2) * STRIP;
                j - 1 < q ? _mm512_storeu_si512(to, two) : put(to, _mm512_castsi512_si256(two));
            }
    }
    _tile_release();
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif
#endif
