// What lies between layers: norms, the gated block and, for one token at a time, attention.
#include <cmath>

#include "layer.h"

namespace {

struct Rooms {
    Workspace first, second, third;
    std::vector<float> hidden, x, normed, heads, scores;  // gate and up; n; n; (heads, size); (heads, keys)
};

Rooms &rooms() {  // each thread that calls has its own; its team works in that
    static thread_local Rooms r;
    return r;
}

void norm(const float *x, const void *weight, int64_t dtype, int64_t n, double eps, float *y) {
    float sums[16] = {};
    for (int64_t i = 0; i < n; i++) sums[i % 16] += x[i] * x[i];
    double sum = 0;
    for (float s : sums) sum += s;
    const float factor = static_cast<float>(1 / std::sqrt(sum / static_cast<double>(n) + eps));
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * read(weight, dtype, i);
}

// The gated block of `some` vectors, by one of a team: `before(t)` leaves V x in r.first.in, `after(t)` finds the output
// in r.second.out, before U'.
template <class Before, class After>
void gated(const Group &outer, const Group &inner, const Backend &b, Rooms &r, int64_t some, const Team &team,
           Before before, After after) {
    const int64_t k = inner[0].n;
    const auto between = [&](int64_t i, int64_t from, int64_t t) {
        leave(outer[i], b, r.first, from, r.hidden.data() + (2 * t + i) * k, QUIP_FLOAT32, t, team.thread);
    };
    product_of(outer, b, r.first, some, team, before, between);
    team.wait();
    const auto middle = [&](int64_t t) {
        float *h = r.hidden.data() + 2 * t * k;
        b.swiglu(h, h + k, k);
        enter(inner[0], b, r.second, h, QUIP_FLOAT32, t, team.thread);
    };
    product_of(inner, b, r.second, some, team, middle, [&](int64_t, int64_t, int64_t t) { after(t); });
}

// Each head of numbers z (heads, size) turned by the angles of its position, to y.
void turn(const float *z, int64_t heads, int64_t size, const void *cos, const void *sin, int64_t dtype, void *y) {
    const int64_t half = size / 2;
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < size; i++) {
            const float other = i < half ? -z[h * size + i + half] : z[h * size + i - half];
            write(y, dtype, h * size + i, z[h * size + i] * read(cos, dtype, i) + other * read(sin, dtype, i));
        }
}

// The heads that one of a team computes, to r.heads; those that share keys and values together.
void attention(const quip_block &l, const Backend &b, Rooms &r, const void *q, const void *K, const void *V, int64_t n,
               int64_t head_step, int64_t step, const Team &team) {
    const int64_t each = l.heads / l.shared;
    for (int64_t s = team.thread; s < l.shared; s += team.size) {
        float *query = r.normed.data() + s * each * l.size;
        for (int64_t i = 0; i < each * l.size; i++)
            query[i] = read(q, l.dtype, s * each * l.size + i) * static_cast<float>(l.scaling);
        b.attend(query, each, l.size, at(K, l.dtype, s * head_step), at(V, l.dtype, s * head_step), n, step,
                 l.dtype == QUIP_FLOAT32, r.scores.data() + s * each * n, r.heads.data() + s * each * l.size);
    }
}

}  // namespace

int quip_gated(const quip_layer *gate, const quip_layer *up, const quip_layer *down, const void *x, void *y, int64_t batch,
               int64_t dtype, int64_t threads) {
    const Backend &b = chosen();
    const quip_layer *const pair[] = {gate, up};
    const Group outer{pair, 2}, inner{&down, 1};
    threads = std::min(threads, 1 + outer.bytes() / WORK);
    return in_pieces(batch, [&, &r = rooms()](int64_t first, int64_t some) {
        r.first.fit(outer, b, some, threads);
        r.second.fit(inner, b, some, threads);
        Workspace::grow(r.hidden, 2 * some * down->n);
        together(threads, [&](const Team &team) {
            const auto before = [&](int64_t t) {
                enter(*gate, b, r.first, at(x, dtype, (first + t) * gate->n), dtype, t, team.thread);
            };
            const auto after = [&](int64_t t) {
                leave(*down, b, r.second, 0, at(y, dtype, (first + t) * down->m), dtype, t, team.thread);
            };
            gated(outer, inner, b, r, some, team, before, after);
        });
    });
}

int quip_block_in(const quip_block *l, const void *x, const void *cos, const void *sin, void *q, void *k, void *v,
                  int64_t threads) {
    const Backend &b = chosen();
    const quip_layer *const three[] = {l->q, l->k, l->v};
    void *const out[] = {q, k, v};
    const Group g{three, 3};
    const int64_t n = l->q->n;
    threads = std::min(threads, 1 + g.bytes() / WORK);
    return in_pieces(1, [&, &r = rooms()](int64_t, int64_t) {
        r.first.fit(g, b, 1, threads);
        Workspace::grow(r.x, n);
        Workspace::grow(r.hidden, g.m());
        together(threads, [&](const Team &team) {
            const auto before = [&](int64_t t) {
                for (int64_t i = 0; i < n; i++) r.x[i] = read(x, l->dtype, i);
                norm(r.x.data(), l->before, l->dtype, n, l->before_eps, r.x.data());
                enter(*l->q, b, r.first, r.x.data(), QUIP_FLOAT32, t, team.thread);
            };
            const auto after = [&](int64_t i, int64_t from, int64_t t) {
                float *z = r.hidden.data() + from;
                if (i == 2) return leave(*l->v, b, r.first, from, v, l->dtype, t, team.thread);
                leave(g[i], b, r.first, from, z, QUIP_FLOAT32, t, team.thread);
                turn(z, g[i].m / l->size, l->size, cos, sin, l->dtype, out[i]);
            };
            product_of(g, b, r.first, 1, team, before, after);
        });
    });
}

int quip_block_out(const quip_block *l, const void *x, const void *q, const void *K, const void *V, int64_t keys,
                   int64_t head_step, int64_t step, void *y, int64_t threads) {
    const Backend &b = chosen();
    const quip_layer *const pair[] = {l->gate, l->up};
    const Group o{&l->o, 1}, outer{pair, 2}, inner{&l->down, 1};
    const int64_t n = l->gate->n, wide = l->heads * l->size;
    threads = std::min(threads, 1 + outer.bytes() / WORK);
    return in_pieces(1, [&, &r = rooms()](int64_t, int64_t) {
        r.first.fit(outer, b, 1, threads);
        r.second.fit(inner, b, 1, threads);
        r.third.fit(o, b, 1, threads);
        Workspace::grow(r.hidden, 2 * l->down->n);
        Workspace::grow(r.x, n);
        Workspace::grow(r.normed, std::max(n, wide));
        Workspace::grow(r.heads, wide);
        Workspace::grow(r.scores, l->heads * keys);
        together(threads, [&](const Team &team) {
            attention(*l, b, r, q, K, V, keys, head_step, step, team);
            team.wait();
            const auto of_heads = [&](int64_t t) { enter(*l->o, b, r.third, r.heads.data(), QUIP_FLOAT32, t, team.thread); };
            const auto add = [&](int64_t, int64_t, int64_t t) {
                leave(*l->o, b, r.third, 0, r.x.data(), QUIP_FLOAT32, t, team.thread);
                for (int64_t i = 0; i < n; i++) r.x[i] += read(x, l->dtype, i);
            };
            product_of(o, b, r.third, 1, team, of_heads, add);
            const auto before = [&](int64_t t) {  // on the thread that added, as there is one vector
                norm(r.x.data(), l->between, l->dtype, n, l->between_eps, r.normed.data());
                enter(*l->gate, b, r.first, r.normed.data(), QUIP_FLOAT32, t, team.thread);
            };
            const auto after = [&](int64_t t) {
                leave(*l->down, b, r.second, 0, r.normed.data(), QUIP_FLOAT32, t, team.thread);
                for (int64_t i = 0; i < n; i++) write(y, l->dtype, i, r.x[i] + r.normed[i]);
            };
            gated(outer, inner, b, r, 1, team, before, after);
        });
    });
}

void quip_rms_norm(const void *x, const void *weight, void *y, int64_t rows, int64_t n, double eps, int64_t dtype) {
    std::vector<float> &z = rooms().x;
    Workspace::grow(z, n);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < n; i++) z[i] = read(x, dtype, r * n + i);
        norm(z.data(), weight, dtype, n, eps, z.data());
        for (int64_t i = 0; i < n; i++) write(y, dtype, r * n + i, z[i]);
    }
}
