// What a long prompt needs of a processor with AMX for bfloat16: 16 activation vectors at a time, a *strip*. Number j of all 16
// is a *column* of it, and two columns lie together as a tile wants them, number by number: a *pair*. Room for a strip begins
// where a line of the cache does, and two bytes before it may be read.
#pragma once
#include "quip.h"

constexpr int64_t STRIP = 16;
constexpr int64_t BEHIND = 32;  // columns
constexpr int64_t ROWS = 48;  // unpacked at a time, in three tiles, and
constexpr int64_t DEEP = 4;   // groups of 64 columns: 24 KB, which stay in the smallest cache beside a strip
constexpr int64_t PANEL = DEEP * 64 * ROWS;

// A factor of a transform, (rows, inner), in tiles of 16 rows and 32 columns, filled up with zeros; each tile twice: of
// the numbers rounded to bfloat16, and of what that has left.
struct Factor {
    int64_t rows, inner, blocks, steps;  // blocks of rows, steps along columns
    const uint16_t *tiles;
};

// A strip of n columns of activations x (count, n), count <= 16; what is missing is zero.
void amx_bring(const uint16_t *x, int64_t n, int64_t count, uint16_t *strip);

// And back: y (count, m).
void amx_take(const uint16_t *strip, int64_t m, int64_t count, uint16_t *y);

// Column i of `to` = factor[i] * column perm[i] of `from` + bias[i]; each of these may be null.
void amx_gather(const uint16_t *from, const int64_t *perm, const float *factor, const float *bias, int64_t n, uint16_t *to);

// Zeros in all pairs after column `first` and before `last`.
void amx_clear(uint16_t *strip, int64_t first, int64_t last);

// Row perm[i] of `count` neighbouring columns of W (m, n), count <= 16, = column i of a strip.
void amx_place(const uint16_t *strip, const int64_t *perm, int64_t m, int64_t count, uint16_t *W, int64_t n);

// Columns offset ... offset + p q, as X (p, q), become L X R', in `out`. BEHIND columns after X must be there, and
// finite. spare is room, of so many numbers.
int64_t amx_spare(const Factor &L, const Factor &R);
void amx_kronecker(const Factor &L, const Factor &R, int64_t offset, const uint16_t *X, uint16_t *out, uint16_t *spare);

// A strip (whole groups of 64 columns) as the product reads it.
void amx_arrange(const uint16_t *strip, int64_t groups, int64_t bits, uint16_t *z);

// The product of `count` rows of codes with `strips` strips z: factor * (2 code - top) z, as strips that are `stride` numbers
// apart. panel (PANEL) and sums are room, of so many numbers.
static constexpr int64_t amx_sums(int64_t count, int64_t strips) { return (count + ROWS - 1) / ROWS * ROWS * strips * STRIP; }
void amx_multiply(const uint8_t *codes, int64_t groups, int64_t bits, int64_t count, const uint16_t *z, int64_t strips,
                  float factor, uint16_t *panel, float *sums, uint16_t *out, int64_t stride);

// The odd numbers 2 code - top of all rows of one group, as four strips, `stride` numbers apart: one has 16 columns of the
// matrix for vectors.
void amx_unpack(const uint8_t *codes, int64_t groups, int64_t bits, int64_t rows, int64_t g, uint16_t *strips, int64_t stride);

// W (m, n) = U' (s C) V / D.
void amx_fold(const quip_layer &l, uint16_t *W, int64_t threads);
