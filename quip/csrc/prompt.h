// What a long prompt needs of a processor with AMX for bfloat16: 16 activation vectors at a time, a *strip*. In a strip,
// number j of all 16 lies together: a *column* of 16 numbers of 16 bits.
#pragma once
#include "quip.h"

constexpr int64_t STRIP = 16;
constexpr int64_t DEEP = 4;  // groups of 64 columns unpacked at a time: 16 KB for 32 rows, which stay in the smallest cache
constexpr int64_t PANEL = DEEP * 64 * 32;

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

// to[perm[i]] = from[i] + bias[perm[i]]
void amx_scatter(const uint16_t *from, const int64_t *perm, const float *bias, int64_t m, uint16_t *to);

// Columns X (p, q) become L X R'; spare is room, of so many numbers.
int64_t amx_spare(const Factor &L, const Factor &R);
void amx_kronecker(const Factor &L, const Factor &R, uint16_t *X, uint16_t *spare);

// Columns (whole groups of 64) as the product reads them.
void amx_arrange(const uint16_t *columns, int64_t groups, int64_t bits, uint16_t *z);

// Columns of the product of `count` rows of codes with `strips` strips z: factor * (2 code - top) z. Of a strip, the columns
// are `stride` numbers after those of the strip before. panel (PANEL) and sums are room, of so many numbers.
static constexpr int64_t amx_sums(int64_t count, int64_t strips) { return (count + 31) / 32 * ((strips + 1) / 2) * 1024; }
void amx_multiply(const uint8_t *codes, int64_t groups, int64_t bits, int64_t count, const uint16_t *z, int64_t strips,
                  float factor, uint16_t *panel, float *sums, uint16_t *out, int64_t stride);

