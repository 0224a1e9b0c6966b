// The library's functions: layers, and groups of layers.
#include "layer.h"

namespace {

Workspace &room() {  // each thread that calls has its own; its team works in that
    static thread_local Workspace w;
    return w;
}

}  // namespace

int quip_linears(const quip_layer *const *layers, int64_t count, const void *x, void *const *y, int64_t batch,
                 int64_t dtype, int64_t threads) {
    const Backend &b = chosen();
    const Group g{layers, count};
    threads = std::min(threads, 1 + g.bytes() / WORK);
    return in_pieces(batch, [&, &w = room()](int64_t first, int64_t some) {
        w.fit(g, b, some, threads);
        together(threads, [&](const Team &team) {
            const auto before = [&](int64_t t) {
                enter(g[0], b, w, at(x, dtype, (first + t) * g[0].n), dtype, t, team.thread);
            };
            const auto after = [&](int64_t k, int64_t from, int64_t t) {
                leave(g[k], b, w, from, at(y[k], dtype, (first + t) * g[k].m), dtype, t, team.thread);
            };
            product_of(g, b, w, some, team, before, after);
        });
    });
}

int quip_linear(const quip_layer *l, const void *x, void *y, int64_t batch, int64_t dtype, int64_t threads) {
    return quip_linears(&l, 1, x, &y, batch, dtype, threads);
}

int quip_multiply(const quip_layer *l, const float *x, float *y, int64_t batch, int64_t threads) {
    const Backend &b = chosen();
    const Group g{&l, 1};
    threads = std::min(threads, 1 + g.bytes() / WORK);
    return in_pieces(batch, [&, &w = room()](int64_t first, int64_t some) {
        w.fit(g, b, some, threads);
        together(threads, [&](const Team &team) {
            const auto before = [&](int64_t t) {
                const float *from = x + (first + t) * l->n;
                std::copy(from, from + l->n, w.in.data() + t * l->n);
            };
            const auto after = [&](int64_t, int64_t, int64_t t) {
                const float *from = w.out.data() + t * l->m;
                std::copy(from, from + l->m, y + (first + t) * l->m);
            };
            product_of(g, b, w, some, team, before, after);
        });
    });
}
