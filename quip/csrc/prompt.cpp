// A layer for a long prompt in bfloat16, on processors with AMX: everything between x and y is in 16 bits, summed in 32.
#include "prompt.h"

#include <algorithm>
#include <new>
#include <vector>

#include "factors.h"
#include "layer.h"

#if defined(HAS_AMX)
namespace {

constexpr int64_t BLOCK = 1 << 20;  // numbers of activations at a time
constexpr int64_t LEAST = 128, LARGEST = 512;  // activations at a time
constexpr int64_t SUMS = 1 << 17;  // at a time, in 32 bits, so that they stay in a core's cache

struct Prompt {
    const quip_layer &l;
    int64_t groups, most, rows;  // of columns; activations at a time; and rows
    int64_t in, to;              // numbers from a strip to the next, of what the product reads and writes
    Products V, U;
    std::vector<int64_t> back;         // U's permutation
    std::vector<float> factor, bias;   // 1 / D, in the order of V; in that of y

    Prompt(const quip_layer &layer, int64_t batch, int64_t threads)
        : l(layer), groups((l.n + 63) / 64), in(groups * 64 * STRIP), to((l.m + 1 + BEHIND) / 2 * 2 * STRIP),
          V(Products::forward(l.n, l.V)), U(Products::backward(l.m, l.U)), back(inverse(l.U.perm, l.m)) {
        const int64_t fit = std::min(BLOCK / l.n, 4 * BLOCK / l.m) / 32 * 32;
        most = std::min(std::min(std::max(fit, LEAST), LARGEST), (batch + 31) / 32 * 32);
        rows = std::min(SUMS / most / ROWS, ((l.m + threads - 1) / threads + ROWS - 1) / ROWS) * ROWS;
        for (int64_t i = 0; l.rescale && i < l.n; i++) factor.push_back(1 / l.rescale[l.V.perm ? l.V.perm[i] : i]);
        for (int64_t i = 0; l.bias && i < l.m; i++) bias.push_back(read(l.bias, l.bias_dtype, i));
    }

    int64_t widest() const { return std::max(in, to) + BEHIND * STRIP; }
    int64_t spare() const { return std::max(V.spare(), U.spare()); }
};

struct Room {
    Lines<uint16_t> z, out;  // of all strips at a time
    struct Own {
        Lines<uint16_t> one, other, spare, panel;
        Lines<float> sums;
    };
    std::vector<Own> of;  // each thread

    void fit(const Prompt &p, int64_t threads) {
        const int64_t strips = p.most / STRIP;
        z.grow(strips * p.in);
        out.grow(strips * p.to);
        if (static_cast<int64_t>(of.size()) < threads) of.resize(threads);
        for (Own &own : of) {
            own.one.grow(p.widest());
            own.other.grow(p.widest());
            own.spare.grow(p.spare());
            own.panel.grow(PANEL);
            own.sums.grow(amx_sums(p.rows, strips));
        }
    }
};

// Up to 16 activations x: V x / D, to z.
void enter(const Prompt &p, const uint16_t *x, int64_t count, Room::Own &own, uint16_t *z) {
    uint16_t *a = own.one.data(), *b = own.other.data();
    amx_bring(x, p.l.n, count, a);
    amx_gather(a, p.l.V.perm, given(p.factor), nullptr, p.l.n, b);
    uint16_t *v = p.V(b, a, own.spare.data());
    amx_clear(v, p.l.n, p.groups * 64);
    amx_arrange(v, p.groups, p.l.bits, z);
}

// Their products, C V x / D: U' of them and the bias, to y.
void leave(const Prompt &p, uint16_t *out, int64_t count, Room::Own &own, uint16_t *y) {
    uint16_t *a = own.one.data(), *u = p.U(out, a, own.spare.data()), *b = own.other.data();
    amx_gather(u, given(p.back), nullptr, given(p.bias), p.l.m, b);
    amx_take(b, p.l.m, count, y);
}

// Activations x (count, n), count <= p.most.
void part_of(const Prompt &p, Room &r, const uint16_t *x, uint16_t *y, int64_t count, const Team &team) {
    const quip_layer &l = p.l;
    const int64_t strips = (count + STRIP - 1) / STRIP;
    const float factor = *l.scale / static_cast<float>((1 << l.bits) - 1);
    Room::Own &own = r.of[team.thread];
    for (int64_t s = team.thread; s < strips; s += team.size)
        enter(p, x + s * STRIP * l.n, std::min(STRIP, count - s * STRIP), own, r.z.data() + s * p.in);
    team.wait();
    for (int64_t i = p.rows * team.thread; i < l.m; i += p.rows * team.size)
        amx_multiply(l.codes + i * width_of(l), p.groups, l.bits, std::min(p.rows, l.m - i), r.z.data(), strips, factor,
                     own.panel.data(), own.sums.data(), r.out.data() + i * STRIP, p.to);
    team.wait();
    for (int64_t s = team.thread; s < strips; s += team.size)
        leave(p, r.out.data() + s * p.to, std::min(STRIP, count - s * STRIP), own, y + s * STRIP * l.m);
}

Room &room() {
    static thread_local Room r;
    return r;
}

}  // namespace

int quip_prompt(const quip_layer *l, const void *x, void *y, int64_t batch, int64_t threads) try {
    if (&chosen() != &amx_backend) return quip_linear(l, x, y, batch, QUIP_BFLOAT16, threads);
    if (!batch) return 0;
    const Prompt p(*l, batch, threads);
    Room &r = room();
    r.fit(p, threads);
    together(threads, [&](const Team &team) {
        for (int64_t t = 0; t < batch; t += p.most)
            part_of(p, r, static_cast<const uint16_t *>(x) + t * l->n, static_cast<uint16_t *>(y) + t * l->m,
                    std::min(p.most, batch - t), team);
    });
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
#else
int quip_prompt(const quip_layer *l, const void *x, void *y, int64_t batch, int64_t threads) {
    return quip_linear(l, x, y, batch, QUIP_BFLOAT16, threads);
}
#endif
