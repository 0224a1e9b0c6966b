// A layer's weights as an ordinary dense matrix, U' (s C) V / D: for so many activations that making it costs less than
// it saves.
#include <cstring>
#include <vector>

#include "layer.h"
#include "prompt.h"

namespace {

constexpr int64_t WIDE = 64;  // columns at a time on the side of U

// What the codes in a byte, of either stream, stand for: the first stream's in full, the second's beside them.
struct Table {
    float first[256][4], second[256][8];

    explicit Table(const quip_layer &l) {
        const int size = l.bits == 4 ? 4 : 2, top = (1 << l.bits) - 1;
        const float factor = *l.scale / static_cast<float>(top);
        for (int byte = 0; byte < 256; byte++) {
            for (int k = 0; k < 8 / size; k++)
                first[byte][k] = static_cast<float>(2 * (byte >> k * size & ((1 << size) - 1)) - top) * factor;
            for (int k = 0; k < 8; k++) second[byte][k] = static_cast<float>(8 * (byte >> k & 1)) * factor;
        }
    }

    // All of a row's codes, those that fill it up as well.
    void read(const quip_layer &l, const uint8_t *row, float *z) const {
        const int64_t width = width_of(l), bytes = l.bits == 3 ? width / 3 * 2 : width, each = l.bits == 4 ? 2 : 4;
        for (int64_t i = 0; i < bytes; i++)
            std::memcpy(z + i * each, first[row[i]], each == 4 ? 16 : 8);
        for (int64_t i = bytes; i < width; i++)
            for (int k = 0; k < 8; k++) z[(i - bytes) * 8 + k] += second[row[i]][k];
    }
};

// Row i of C V / D, to M.
void row_of(const quip_layer &l, const Backend &b, const Table &table, int64_t i, float *z, float *spare, float *M) {
    table.read(l, l.codes + i * width_of(l), z);
    undo(l.V, b, z, spare);
    for (int64_t j = 0; j < l.n; j++) {
        const int64_t to = l.V.perm ? l.V.perm[j] : j;
        M[i * l.n + to] = l.rescale ? z[j] / l.rescale[to] : z[j];
    }
}

// X -> L' X R of every column of x (m, columns). In between, spare is (q, p, columns), so that what is read lies close.
void backward_all(const quip_stage &s, const Backend &b, float *x, float *spare, int64_t columns) {
    float *X = x + s.offset * columns;
    const int64_t p = s.p, q = s.q;
    for (int64_t i = 0; i < p; i++)
        b.product(s.R, 1, q, X + i * q * columns, spare + i * columns, p * columns, q, q, columns);
    for (int64_t j = 0; j < q; j++)
        b.product(s.L, 1, p, spare + j * p * columns, X + j * columns, q * columns, p, p, columns);
}

// U' of columns first ... first + count of M, to W.
template <int DTYPE>
void columns_of(const quip_layer &l, const Backend &b, const float *M, int64_t first, int64_t count, float *x, float *spare,
                void *W) {
    for (int64_t i = 0; i < l.m; i++) std::copy_n(M + i * l.n + first, count, x + i * count);
    for (int64_t s = l.U.stages; s-- > 0;) backward_all(l.U.stage[s], b, x, spare, count);
    for (int64_t i = 0; i < l.m; i++) {
        const int64_t to = (l.U.perm ? l.U.perm[i] : i) * l.n + first;
        for (int64_t j = 0; j < count; j++) write(W, DTYPE, to + j, x[i * count + j]);
    }
}

}  // namespace

int quip_dense(const quip_layer *l, void *W, int64_t dtype, int64_t threads) try {
    const Backend &b = chosen();
#if defined(HAS_AMX)
    if (&b == &amx_backend && dtype == QUIP_BFLOAT16) {
        amx_fold(*l, static_cast<uint16_t *>(W), threads);
        return 0;
    }
#endif
    const Table table(*l);
    const auto f = dtype == QUIP_FLOAT32 ? columns_of<QUIP_FLOAT32> : dtype == QUIP_FLOAT16 ? columns_of<QUIP_FLOAT16> : columns_of<QUIP_BFLOAT16>;
    const int64_t size = std::max((l->n + 63) / 64 * 64, l->m * std::min(WIDE, l->n));
    std::vector<float> own(dtype == QUIP_FLOAT32 ? 0 : l->m * l->n), x(threads * size), spare(threads * size);
    float *M = dtype == QUIP_FLOAT32 ? static_cast<float *>(W) : own.data();
    together(threads, [&](const Team &team) {
        float *z = x.data() + team.thread * size, *room = spare.data() + team.thread * size;
        for (int64_t i = team.thread; i < l->m; i += team.size) row_of(*l, b, table, i, z, room, M);
        team.wait();
        for (int64_t j = team.thread * WIDE; j < l->n; j += team.size * WIDE)
            f(*l, b, M, j, std::min(WIDE, l->n - j), z, room, W);
    });
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
