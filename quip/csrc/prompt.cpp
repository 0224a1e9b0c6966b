// A layer for a long prompt in bfloat16, on processors with AMX: everything between x and y is in 16 bits, summed in 32.
#include "prompt.h"

#include <algorithm>
#include <new>
#include <vector>

#include "layer.h"

#if defined(HAS_AMX)
namespace {

constexpr int64_t BLOCK = 1 << 20;  // numbers of activations at a time
constexpr int64_t LEAST = 128, LARGEST = 512;  // activations at a time
constexpr int64_t SUMS = 1 << 17;  // at a time, in 32 bits, so that they stay in a core's cache

// Room that begins where a line of the cache does, as tiles like it.
template <class T>
struct Lines {
    std::vector<T> own;

    void grow(int64_t n) {
        if (static_cast<int64_t>(own.size()) < n + 64) own.resize(n + 64);
    }

    T *data() { return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(own.data()) + 63) / 64 * 64); }
};

// A (rows, inner), A(i, k) at A[i * row_step + k * step], as tiles.
struct Tiled {
    Factor factor;
    Lines<uint16_t> own;

    Tiled(const float *A, int64_t rows, int64_t inner, int64_t row_step, int64_t step)
        : factor{rows, inner, (rows + 15) / 16, (inner + 31) / 32, nullptr} {
        own.grow(factor.blocks * factor.steps * 1024);
        factor.tiles = own.data();
        for (int64_t i = 0; i < rows; i++)
            for (int64_t k = 0; k < inner; k++) {
                const float a = A[i * row_step + k * step];
                uint16_t *at = own.data() + (i / 16 * factor.steps + k / 32) * 1024 + i % 16 * 32 + k % 32;
                at[0] = float_to_bfloat16(a);
                at[512] = float_to_bfloat16(a - bfloat16_to_float(at[0]));
            }
    }

    Tiled(Tiled &&) = default;  // a vector that is moved keeps its address
    Tiled(const Tiled &) = delete;
};

// Both factors of a Kronecker product, and where it begins.
struct Product {
    int64_t offset;
    Tiled L, R;

    static Product forward(const quip_stage &s) {
        return {s.offset, {s.L, s.p, s.p, s.p, 1}, {s.R, s.q, s.q, s.q, 1}};
    }

    static Product backward(const quip_stage &s) {
        return {s.offset, {s.L, s.p, s.p, 1, s.p}, {s.R, s.q, s.q, 1, s.q}};
    }
};

struct Prompt {
    const quip_layer &l;
    int64_t groups, most, rows;  // of columns; activations at a time; and rows
    std::vector<Product> V, U;
    std::vector<float> bias;

    Prompt(const quip_layer &layer, int64_t batch, int64_t threads) : l(layer), groups((layer.n + 63) / 64) {
        most = std::min(std::min(std::max(BLOCK / l.n / 32 * 32, LEAST), LARGEST), (batch + 31) / 32 * 32);
        rows = std::min(SUMS / most / 32 * 32, ((l.m + threads - 1) / threads + 31) / 32 * 32);
        for (int64_t i = 0; i < l.V.stages; i++) V.push_back(Product::forward(l.V.stage[i]));
        for (int64_t i = l.U.stages; i-- > 0;) U.push_back(Product::backward(l.U.stage[i]));
        for (int64_t i = 0; l.bias && i < l.m; i++) bias.push_back(read(l.bias, l.bias_dtype, i));
    }

    int64_t widest() const { return std::max(groups * 64, l.m) * STRIP; }

    // for one product of a transform
    int64_t spare() const {
        int64_t most = widest();
        for (const auto *t : {&V, &U})
            for (const Product &k : *t) most = std::max(most, amx_spare(k.L.factor, k.R.factor));
        return most;
    }
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
            own.other.grow(p.spare());
            own.panel.grow(PANEL);
            own.sums.grow(amx_sums(p.rows, strips));
        }
    }
};

// Up to 16 activations x: V x / D, to z.
void enter(const Prompt &p, const uint16_t *x, int64_t count, uint16_t *a, uint16_t *b, uint16_t *z) {
    amx_bring(x, p.l.n, count, b);
    amx_gather(b, p.l.V.perm, p.l.rescale, p.l.n, a);
    for (const Product &v : p.V) amx_kronecker(v.L.factor, v.R.factor, a + v.offset * STRIP, b);
    std::fill(a + p.l.n * STRIP, a + p.groups * 64 * STRIP, 0);
    amx_arrange(a, p.groups, p.l.bits, z);
}

// Their products, C V x / D: U' of them and the bias, to y.
void leave(const Prompt &p, uint16_t *out, int64_t count, uint16_t *a, uint16_t *b, uint16_t *y) {
    for (const Product &u : p.U) amx_kronecker(u.L.factor, u.R.factor, out + u.offset * STRIP, b);
    amx_scatter(out, p.l.U.perm, p.l.bias ? p.bias.data() : nullptr, p.l.m, a);
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
