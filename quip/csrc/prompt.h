// What a long prompt needs of a processor with AMX for bfloat16: 16 activation vectors at a time, a *strip*. In a strip,
// number j of all 16 lies together: a *column* of 16 numbers of 16 bits.
#pragma once
#include "quip.h"

constexpr int64_t STRIP = 16;
constexpr int64_t ROWS = 48;  // unpacked at a time, in three tiles, and
constexpr int64_t DEEP = 4;   // groups of 64 columns: 24 KB, which stay in the smallest cache beside a strip
constexpr int64_t PANEL = DEEP * 64 * ROWS;

// A factor of a transform, (rows, inner), in tiles of 16 rows and 32 columns, filled up with zeros; each tile twice: of
// the numbers rounded to bfloat16, and of what that has left.
struct Factor {
    int64_t rows, inner, blocks, steps;  // blocks of rows, steps along columns
    const uint16_t *tiles;
};

// Columns (n) of activations x (count, n), count <= 16; what is missing is zero.
void amx_bring(const uint16_t *x, int64_t n, int64_t count, uint16_t *columns);

// And back: y (count, m).
void amx_take(const uint16_t *columns, int64_t m, int64_t count, uint16_t *y);

// to[i] = from[perm[i]] / divisor[perm[i]]
void amx_gather(const uint16_t *from, const int64_t *perm, const float *divisor, int64_t n, uint16_t *to);

// to[perm[i]] = factor[perm[i]] from[i] + bias[perm[i]]
void amx_scatter(const uint16_t *from, const int64_t *perm, const float *factor, const float *bias, int64_t m, uint16_t *to);

// Row perm[i] of `count` neighbouring columns of W (m, n), count <= 16, = number i of a strip.
void amx_place(const uint16_t *columns, const int64_t *perm, int64_t m, int64_t count, uint16_t *W, int64_t n);

// Columns X (p, q) become L X R'; spare is room, of so many numbers.
int64_t amx_spare(const Factor &L, const Factor &R);
void amx_kronecker(const Factor &L, const Factor &R, uint16_t *X, uint16_t *spare);

// Columns (whole groups of 64) as the product reads them.
void amx_arrange(const uint16_t *columns, int64_t groups, int64_t bits, uint16_t *z);

// Columns of the product of `count` rows of codes with `strips` strips z: factor * (2 code - top) z. Of a strip, the columns
// are `stride` numbers after those of the strip before. panel (PANEL) and sums are room, of so many numbers.
static constexpr int64_t amx_sums(int64_t count, int64_t strips) { return (count + ROWS - 1) / ROWS * ROWS * strips * STRIP; }
void amx_multiply(const uint8_t *codes, int64_t groups, int64_t bits, int64_t count, const uint16_t *z, int64_t strips,
                  float factor, uint16_t *panel, float *sums, uint16_t *out, int64_t stride);

// The odd numbers 2 code - top of all rows of one group, as four strips: 16 columns of the matrix are one.
void amx_unpack(const uint8_t *codes, int64_t groups, int64_t bits, int64_t rows, int64_t g, uint16_t *strips);

// W (m, n) = U' (s C) V / D.
void amx_fold(const quip_layer &l, uint16_t *W, int64_t threads);
