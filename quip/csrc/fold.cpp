// A layer's weights as a dense matrix in bfloat16, with AMX: U' and V' of strips, first of columns, then of rows.
#include <algorithm>
#include <vector>

#include "factors.h"
#include "layer.h"

#if defined(HAS_AMX)
namespace {

struct Fold {
    const quip_layer &l;
    int64_t groups, stride;  // of columns; numbers from a strip to the next
    Products U, V;
    std::vector<int64_t> back;  // V's permutation
    std::vector<float> factor;  // (n): that of the codes, over D

    explicit Fold(const quip_layer &layer)
        : l(layer), groups((l.n + 63) / 64), stride((l.m + 1 + BEHIND) / 2 * 2 * STRIP), U(Products::backward(l.m, l.U)),
          V(Products::backward(l.n, l.V)), back(inverse(l.V.perm, l.n)), factor(l.n) {
        for (int64_t j = 0; j < l.n; j++)
            factor[j] = *l.scale / static_cast<float>((1 << l.bits) - 1) / (l.rescale ? l.rescale[j] : 1);
    }

    int64_t row() const { return (l.n + 1 + BEHIND) / 2 * 2 * STRIP; }
    int64_t spare() const { return std::max(U.spare(), V.spare()); }
};

struct Room {
    Lines<uint16_t> strips, other, spare;

    explicit Room(const Fold &f) {
        strips.grow(std::max(4 * f.stride, f.row()));
        other.grow(std::max(f.stride, f.row()));
        spare.grow(f.spare());
    }
};

// U' of the 64 columns of group g, to those of W.
void columns_of(const Fold &f, int64_t g, Room &r, uint16_t *W) {
    const quip_layer &l = f.l;
    uint16_t *strip = r.strips.data();
    amx_unpack(l.codes, f.groups, l.bits, l.m, g, strip, f.stride);
    for (int64_t j = 64 * g; j < std::min(64 * (g + 1), l.n); j += STRIP, strip += f.stride)
        amx_place(f.U(strip, r.other.data(), r.spare.data()), l.U.perm, l.m, std::min(STRIP, l.n - j), W + j, l.n);
}

// V' of `count` rows of W, at most 16, in place.
void rows_of(const Fold &f, int64_t count, Room &r, uint16_t *W) {
    uint16_t *a = r.strips.data(), *b = r.other.data();
    amx_bring(W, f.l.n, count, a);
    uint16_t *v = f.V(a, b, r.spare.data()), *to = v == a ? b : a;
    amx_gather(v, given(f.back), f.factor.data(), nullptr, f.l.n, to);
    amx_take(to, f.l.n, count, W);
}

}  // namespace

void amx_fold(const quip_layer &l, uint16_t *W, int64_t threads) {
    const Fold f(l);
    std::vector<Room> rooms(threads, Room(f));
    together(threads, [&](const Team &team) {
        Room &r = rooms[team.thread];
        for (int64_t g = team.thread; g < f.groups; g += team.size) columns_of(f, g, r, W);
        team.wait();
        for (int64_t i = STRIP * team.thread; i < l.m; i += STRIP * team.size)
            rows_of(f, std::min(STRIP, l.m - i), r, W + i * l.n);
    });
}
#endif
