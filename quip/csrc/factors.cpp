// Both products of a transform on a strip, with AMX.
#include "backend.h"
#include "prompt.h"

#if defined(HAS_AMX)
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

struct Pair {  // a block of a factor, and two times columns
    const uint16_t *tiles;
    int64_t steps;
    const uint16_t *b, *c;
};

#define STORE_BOTH(NAME, A, B)                    \
    inline void NAME(float *first, float *second) { \
        _tile_stored(A, first, 64);               \
        _tile_stored(B, second, 64);              \
    }
STORE_BOTH(store_even, 0, 1)
STORE_BOTH(store_odd, 2, 3)

// Blocks of a factor times columns, two at a time: at(n) says of which, and done(n, sums) gets both tiles. In a pipeline: while
// some are multiplied, those before them are stored, and those before these become 16 bits; so that tiles and vectors work
// at once, and nothing waits. sums is room for four tiles, which lie apart from each other in the smallest cache.
template <class At, class Done>
inline void pipeline(int64_t count, float *sums, At at, Done done) {
    float *even = sums, *odd = sums + 512;
    published();
    const auto begin = [&](auto times, int64_t n) {
        const Pair p = at(n);
        times(p.tiles, p.steps, p.b, p.c);
    };
    for (int64_t n = 0; n < count + 2; n += 2) {
        if (n < count) begin(times_even, n);
        if (n && n <= count) store_odd(odd, odd + 256);
        if (n) done(n - 2, even);
        if (n + 1 < count) begin(times_odd, n + 1);
        if (n + 1 <= count) store_even(even, even + 256);
        if (n && n - 1 < count) done(n - 1, odd);
    }
}

// Row i of X (p, q), from column `first` on, as pairs; zeros fill up `steps` tiles.
void pair_up(const uint16_t *X, int64_t first, int64_t q, int64_t steps, uint16_t *pairs) {
    const __m512i lower_half = _mm512_set1_epi32(0xFFFF);
    int64_t j = 0;
    for (; j + 1 < q; j += 2) put(pairs + j * STRIP, pair_of(X, first + j, first + j + 1));
    if (j < q) put(pairs + j * STRIP, _mm512_and_si512(pair(X + place(first + j)), lower_half)), j += 2;
    for (; j < 32 * steps; j += 2) put(pairs + j * STRIP, _mm512_setzero_si512());
}

// Column c of a strip.
inline void put_column(uint16_t *strip, int64_t c, __m512 v) {
    _mm512_mask_storeu_epi16(strip + place(c), 0x55555555, narrow(v, v));
}

// From one row of pairs to the next: a line of the cache more than it takes, since at a power of two all would share a
// few places of the smallest cache.
inline int64_t padded(const Factor &L) { return L.steps * 512 + 32; }

}  // namespace

int64_t amx_spare(const Factor &L, const Factor &R) { return 2048 + R.steps * 512 * L.rows + 16 * padded(L); }

// 16 columns of X R' at a time, and L times these, which are in the cache. Rows of X are pairs of columns as they are, if they
// begin with a pair; otherwise they are made so. What lies beyond the end of a row meets a zero of R. An odd one out is its own
// neighbour, and what comes of that meets a zero of L or is not looked at.
void amx_kronecker(const Factor &L, const Factor &R, int64_t offset, const uint16_t *X, uint16_t *out, uint16_t *spare) {
    const int64_t p = L.rows, q = R.rows, deep = padded(L);
    const bool even = q % 2 == 0 && offset % 2 == 0;
    float *sums = reinterpret_cast<float *>(spare);
    uint16_t *Y = spare + 2048, *pairs = Y + 16 * deep;
    const int64_t wide = even ? q * STRIP : R.steps * 512;
    const uint16_t *rows = even ? X + offset * STRIP : pairs;
    whole_tiles();
    for (int64_t i = 0; i < p && !even; i++) pair_up(X, offset + i * q, q, R.steps, pairs + i * wide);
    for (int64_t i = (p + 1) / 2 * 2; i < 32 * L.steps; i += 2)
        for (int64_t j = 0; j < 16; j++) put(Y + j * deep + i * STRIP, _mm512_setzero_si512());
    for (int64_t r = 0; r < R.blocks; r++) {
        const int64_t columns = std::min<int64_t>(q - 16 * r, 16), half = (columns + 1) / 2;
        pipeline(
            (p + 1) / 2, sums,
            [&](int64_t n) {
                return Pair{R.tiles + r * R.steps * 1024, R.steps, rows + 2 * n * wide, rows + std::min(2 * n + 1, p - 1) * wide};
            },
            [&](int64_t n, const float *s) {
                for (int64_t j = 0; j < columns; j++) put(Y + j * deep + 2 * n * STRIP, narrow(row(s, j), row(s + 256, j)));
            });
        pipeline(
            L.blocks * half, sums,
            [&](int64_t n) {
                const int64_t j = n % half * 2;
                return Pair{L.tiles + n / half * L.steps * 1024, L.steps, Y + j * deep, Y + std::min(j + 1, columns - 1) * deep};
            },
            [&](int64_t n, const float *s) {
                const int64_t j = n % half * 2, i = n / half * 16, count = std::min<int64_t>(p - i, 16);
                for (int64_t k = 0, c = offset + i * q + 16 * r + j; k < count; k++, c += q)
                    if (even)
                        put(out + c * STRIP, narrow(row(s, k), row(s + 256, k)));
                    else {
                        put_column(out, c, row(s, k));
                        if (j + 1 < columns) put_column(out, c + 1, row(s + 256, k));
                    }
            });
    }
    _tile_release();
}

#include "tiles_end.h"
#endif
