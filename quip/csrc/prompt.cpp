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
    Products V, U;
    std::vector<float> bias;

    Prompt(const quip_layer &layer, int64_t batch, int64_t threads)
        : l(layer), groups((layer.n + 63) / 64), V(forward(layer.V)), U(backward(layer.U)) {
        most = std::min(std::min(std::max(BLOCK / l.n / 32 * 32, LEAST), LARGEST), (batch + 31) / 32 * 32);
        rows = std::min(SUMS / most / ROWS, ((l.m + threads - 1) / threads + ROWS - 1) / ROWS) * ROWS;
        for (int64_t i = 0; l.bias && i < l.m; i++) bias.push_back(read(l.bias, l.bias_dtype, i));
    }

    int64_t widest() const { return std::max(groups * 64, l.m) * STRIP; }
};

struct Room {
    Lines<uint16_t> z, out;  // of all strips at a time
    struct Own {
        Lines<uint16_t> one, other, panel;
        Lines<float> sums;
    };
    std::vector<Own> of;  // each thread

    void fit(const Prompt &p, int64_t threads) {
        const int64_t strips = p.most / STRIP;
        z.grow(strips * p.groups * 64 * STRIP);
        out.grow(strips * p.l.m * STRIP);
        if (static_cast<int64_t>(of.size()) < threads) of.resize(threads);
        for (Own &own : of) {
            own.one.grow(p.widest());
            own.other.grow(std::max(p.widest(), std::max(spare_of(p.V), spare_of(p.U))));
            own.panel.grow(PANEL);
            own.sums.grow(amx_sums(p.rows, strips));
        }
    }
};

// Up to 16 activations x: V x / D, to z.
void enter(const Prompt &p, const uint16_t *x, int64_t count, uint16_t *a, uint16_t *b, uint16_t *z) {
    amx_bring(x, p.l.n, count, b);
    amx_gather(b, p.l.V.perm, p.l.rescale, p.l.n, a);
    for (const Product &v : p.V) v(a, b);
    std::fill(a + p.l.n * STRIP, a + p.groups * 64 * STRIP, 0);
    amx_arrange(a, p.groups, p.l.bits, z);
}

// Their products, C V x / D: U' of them and the bias, to y.
void leave(const Prompt &p, uint16_t *out, int64_t count, uint16_t *a, uint16_t *b, uint16_t *y) {
    for (const Product &u : p.U) u(out, b);
    amx_scatter(out, p.l.U.perm, nullptr, p.l.bias ? p.bias.data() : nullptr, p.l.m, a);
    amx_take(a, p.l.m, count, y);
}

// Activations x (count, n), count <= p.most.
void part_of(const Prompt &p, Room &r, const uint16_t *x, uint16_t *y, int64_t count, const Team &team) {
    const quip_layer &l = p.l;
    const int64_t strips = (count + STRIP - 1) / STRIP, in = p.groups * 64 * STRIP, to = l.m * STRIP;
    const float factor = *l.scale / static_cast<float>((1 << l.bits) - 1);
    Room::Own &own = r.of[team.thread];
    uint16_t *a = own.one.data(), *b = own.other.data();
    for (int64_t s = team.thread; s < strips; s += team.size)
        enter(p, x + s * STRIP * l.n, std::min(STRIP, count - s * STRIP), a, b, r.z.data() + s * in);
    team.wait();
    for (int64_t i = p.rows * team.thread; i < l.m; i += p.rows * team.size)
        amx_multiply(l.codes + i * width_of(l), p.groups, l.bits, std::min(p.rows, l.m - i), r.z.data(), strips, factor,
                     own.panel.data(), own.sums.data(), r.out.data() + i * STRIP, to);
    team.wait();
    for (int64_t s = team.thread; s < strips; s += team.size)
        leave(p, r.out.data() + s * to, std::min(STRIP, count - s * STRIP), a, b, y + s * STRIP * l.m);
    team.wait();
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
