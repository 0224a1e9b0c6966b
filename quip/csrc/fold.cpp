// A layer's weights as a dense matrix in bfloat16, with AMX: U' and V' of a strip of 16 columns, then of 16 rows, at a time.
#include <algorithm>
#include <vector>

#include "factors.h"
#include "layer.h"

#if defined(HAS_AMX)
namespace {

struct Fold {
    const quip_layer &l;
    int64_t groups;
    Products U, V;
    std::vector<float> factor;  // (n): that of the codes, over D

    explicit Fold(const quip_layer &layer)
        : l(layer), groups((l.n + 63) / 64), U(backward(l.U)), V(backward(l.V)), factor(l.n) {
        for (int64_t j = 0; j < l.n; j++)
            factor[j] = *l.scale / static_cast<float>((1 << l.bits) - 1) / (l.rescale ? l.rescale[j] : 1);
    }

    int64_t strip() const { return std::max(l.m, l.n) * STRIP; }
    int64_t spare() const { return std::max(strip(), std::max(spare_of(U), spare_of(V))); }
};

// U' of the 64 columns of group g, to those of W.
void columns_of(const Fold &f, int64_t g, uint16_t *strips, uint16_t *spare, uint16_t *W) {
    const quip_layer &l = f.l;
    amx_unpack(l.codes, f.groups, l.bits, l.m, g, strips);
    for (int64_t j = 64 * g; j < std::min(64 * (g + 1), l.n); j += STRIP, strips += l.m * STRIP) {
        for (const Product &u : f.U) u(strips, spare);
        amx_place(strips, l.U.perm, l.m, std::min(STRIP, l.n - j), W + j, l.n);
    }
}

// V' of `count` rows of W, at most 16, in place.
void rows_of(const Fold &f, int64_t count, uint16_t *a, uint16_t *b, uint16_t *W) {
    const quip_layer &l = f.l;
    amx_bring(W, l.n, count, a);
    for (const Product &v : f.V) v(a, b);
    amx_scatter(a, l.V.perm, f.factor.data(), nullptr, l.n, b);
    amx_take(b, l.n, count, W);
}

}  // namespace

void amx_fold(const quip_layer &l, uint16_t *W, int64_t threads) {
    const Fold f(l);
    std::vector<Lines<uint16_t>> strips(threads), spare(threads);
    for (auto &s : strips) s.grow(std::max(4 * l.m * STRIP, f.strip()));
    for (auto &s : spare) s.grow(f.spare());
    together(threads, [&](const Team &team) {
        uint16_t *a = strips[team.thread].data(), *b = spare[team.thread].data();
        for (int64_t g = team.thread; g < f.groups; g += team.size) columns_of(f, g, a, b, W);
        team.wait();
        for (int64_t i = STRIP * team.thread; i < l.m; i += STRIP * team.size)
            rows_of(f, std::min(STRIP, l.m - i), a, b, W + i * l.n);
    });
}
#endif
