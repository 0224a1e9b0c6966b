// Layers that share an input: V, the packed products and U' of a batch of activations, on several threads.
#pragma once
#include <algorithm>
#include <new>
#include <vector>

#include "backend.h"
#include "kronecker.h"
#include "numbers.h"
#include "quip.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

// One of the threads at work on a call.
struct Team {
    int thread, size;

    void wait() const {  // for all others
#if defined(_OPENMP)
#pragma omp barrier
#endif
    }
};

template <class F>
void together(int64_t threads, F f) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
    f(Team{omp_get_thread_num(), omp_get_num_threads()});
#else
    f(Team{0, 1});
#endif
}

inline int64_t whole_vectors(int64_t bytes, int vector) { return (bytes + vector - 1) / vector * vector; }

inline int64_t width_of(const quip_layer &l) { return (l.n + 63) / 64 * 8 * l.bits; }

// Layers of one width n and one number of bits, with one V and one D; their outputs are counted one after the other.
struct Group {
    const quip_layer *const *layers;
    int64_t count;

    const quip_layer &operator[](int64_t k) const { return *layers[k]; }

    int64_t before(int64_t k) const {  // outputs of the layers before layer k
        int64_t m = 0;
        for (int64_t i = 0; i < k; i++) m += layers[i]->m;
        return m;
    }

    int64_t m() const { return before(count); }

    int64_t widest() const {
        int64_t most = layers[0]->n;
        for (int64_t i = 0; i < count; i++) most = std::max(most, layers[i]->m);
        return most;
    }

    int64_t bytes() const { return m() * width_of(*layers[0]); }
};

// All the room that one product needs.
struct Workspace {
    int64_t width, bytes, fields;        // of a row of codes; of its first stream; codes in each of those bytes
    int64_t columns, size, m, widest;    // n, filled up to whole vectors; bytes of digits for one activation vector
    std::vector<float> in, out, spare;   // (batch, n), (batch, m), (threads, widest)
    std::vector<int16_t> q;              // (threads, columns)
    std::vector<int8_t> digits;          // (batch, size)
    std::vector<int64_t> sums;           // (batch, m)
    std::vector<Quantized> activations;  // (batch)

    // Room that is there already is used again: new pages cost more than the product of a small layer.
    void fit(const Group &g, const Backend &b, int64_t batch, int64_t threads) {
        const quip_layer &l = g[0];
        width = width_of(l), m = g.m(), widest = g.widest();
        bytes = l.bits == 3 ? width / 3 * 2 : width;
        fields = l.bits == 4 ? 2 : 4;
        columns = fields * whole_vectors(bytes, b.vector);
        size = 2 * columns;
        grow(in, batch * l.n);
        grow(out, batch * m);
        grow(spare, threads * widest);
        grow(q, threads * columns);
        grow(digits, batch * size);
        grow(sums, batch * m);
        grow(activations, batch);
    }

    template <class T>
    static void grow(std::vector<T> &v, int64_t n) {
        if (static_cast<int64_t>(v.size()) < n) v.resize(n);
    }
};

inline void to_digits(const quip_layer &l, const Backend &b, Workspace &w, int64_t t, int thread) {
    int16_t *q = w.q.data() + thread * w.columns;
    std::fill(q + l.n, q + w.columns, 0);
    w.activations[t] = b.quantize(w.in.data() + t * l.n, l.n, q);
    b.arrange(q, w.bytes, w.fields, w.digits.data() + t * w.size);
}

template <int DTYPE>
void gather(const quip_layer &l, const void *x, float *z) {
    for (int64_t i = 0; i < l.n; i++) {
        const int64_t j = l.V.perm ? l.V.perm[i] : i;
        z[i] = read(x, DTYPE, j);
        if (l.rescale) z[i] /= l.rescale[j];
    }
}

// V x / D of vector t, in w.in.
inline void enter(const quip_layer &l, const Backend &b, Workspace &w, const void *x, int64_t dtype, int64_t t, int thread) {
    float *z = w.in.data() + t * l.n;
    const auto f = dtype == QUIP_FLOAT32 ? gather<QUIP_FLOAT32> : dtype == QUIP_FLOAT16 ? gather<QUIP_FLOAT16> : gather<QUIP_BFLOAT16>;
    f(l, x, z);
    apply(l.V, b, z, w.spare.data() + thread * w.widest);
}

// The integers of rows first ... last of a product as numbers, in place: C = (2 code - top) / top.
inline void to_floats(const quip_layer &l, const Backend &b, Workspace &w, int64_t t, int64_t at, int64_t first, int64_t last) {
    const int64_t top = (1 << l.bits) - 1, from = t * w.m + at + first;
    const double factor = w.activations[t].step * *l.scale / static_cast<double>(top);
    b.scale(w.sums.data() + from, last - first, factor, top * w.activations[t].sum, w.out.data() + from);
}

// U' of vector t of the layer whose outputs begin at `at`, and the bias.
inline void leave(const quip_layer &l, const Backend &b, Workspace &w, int64_t at, void *y, int64_t dtype, int64_t t, int thread) {
    float *z = w.out.data() + t * w.m + at;
    undo(l.U, b, z, w.spare.data() + thread * w.widest);
    for (int64_t i = 0; i < l.m; i++) {
        const int64_t j = l.U.perm ? l.U.perm[i] : i;
        write(y, dtype, j, l.bias ? z[i] + read(l.bias, l.bias_dtype, j) : z[i]);
    }
}

// The rows of a group's products that one thread computes, in multiples of 16.
inline void rows_of(const Group &g, const Backend &b, Workspace &w, int64_t batch, const Team &team) {
    const int64_t each = ((w.m + team.size - 1) / team.size + 15) / 16 * 16;
    for (int64_t k = 0, at = 0; k < g.count; at += g[k++].m) {
        const quip_layer &l = g[k];
        const int64_t first = std::min(std::max<int64_t>(team.thread * each - at, 0), l.m);
        const int64_t last = std::min(std::max<int64_t>((team.thread + 1) * each - at, 0), l.m);
        b.multiply(l.codes + first * w.width, w.width, l.bits, last - first, w.digits.data(), w.size, batch,
                   w.sums.data() + at + first, w.m);
        for (int64_t t = 0; t < batch; t++) to_floats(l, b, w, t, at, first, last);
    }
}

// One after the other: `before(t)` (to w.in), the digits, the products, `after(k, at, t)` (from w.out). Vectors are
// shared out among threads before and after the product, rows during it.
template <class Before, class After>
void product_of(const Group &g, const Backend &b, Workspace &w, int64_t batch, const Team &team, Before before, After after) {
    for (int64_t t = team.thread; t < batch; t += team.size) {
        before(t);
        to_digits(g[0], b, w, t, team.thread);
    }
    team.wait();
    rows_of(g, b, w, batch, team);
    team.wait();
    for (int64_t i = team.thread; i < g.count * batch; i += team.size) after(i / batch, g.before(i / batch), i % batch);
}

constexpr int64_t MOST = 32;     // activations at a time
constexpr int64_t WORK = 65536;  // bytes of codes for which another thread pays, at least

const Backend &chosen();

// f(first, some) for up to MOST activations at a time. 0, or 1 if there is no memory.
template <class F>
int in_pieces(int64_t batch, F f) try {
    for (int64_t first = 0; first < batch; first += MOST) f(first, std::min(batch - first, MOST));
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

inline const void *at(const void *x, int64_t dtype, int64_t i) {
    return static_cast<const char *>(x) + i * (dtype == QUIP_FLOAT32 ? 4 : 2);
}

inline void *at(void *y, int64_t dtype, int64_t i) { return static_cast<char *>(y) + i * (dtype == QUIP_FLOAT32 ? 4 : 2); }
