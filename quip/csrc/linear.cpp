// The layer: V, the packed product and U' of a batch of activations, on several threads. And what chooses the backend.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "backend.h"
#include "kronecker.h"
#include "numbers.h"
#include "quip.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

const Backend *const ALL[] = {&avx512_backend, &avx2_backend, &neon_backend, &portable_backend};

const Backend *best() {
    return *std::find_if(std::begin(ALL), std::end(ALL), [](const Backend *b) { return b->runs_here(); });
}

std::atomic<const Backend *> backend{best()};

int64_t whole_vectors(int64_t bytes, int vector) { return (bytes + vector - 1) / vector * vector; }

int64_t width_of(const quip_layer &l) { return (l.n + 63) / 64 * 8 * l.bits; }

// All the room that one call needs, for at most MOST activations at a time.
constexpr int64_t MOST = 32;

// Bytes of codes for which another thread pays, at least.
constexpr int64_t WORK = 65536;

struct Workspace {
    int64_t first = 0;  // of the activations at work
    int64_t width, bytes, fields;        // of a row of codes; of its first stream; codes in each of those bytes
    int64_t columns, size;               // n, filled up to whole vectors; bytes of digits for one activation vector
    std::vector<float> in, out, spare;   // (batch, n), (batch, m), (threads, max(m, n))
    std::vector<int16_t> q;              // (threads, columns)
    std::vector<int8_t> digits;          // (batch, size)
    std::vector<int64_t> sums;           // (batch, m)
    std::vector<Quantized> activations;  // (batch)

    // Room that is there already is used again: new pages cost more than the product of a small layer.
    void fit(const quip_layer &l, const Backend &b, int64_t batch, int64_t threads) {
        first = 0;
        width = width_of(l);
        bytes = l.bits == 3 ? width / 3 * 2 : width;
        fields = l.bits == 4 ? 2 : 4;
        columns = fields * whole_vectors(bytes, b.vector);
        size = 2 * columns;
        grow(in, batch * l.n);
        grow(out, batch * l.m);
        grow(spare, threads * std::max(l.m, l.n));
        grow(q, threads * columns);
        grow(digits, batch * size);
        grow(sums, batch * l.m);
        grow(activations, batch);
    }

    template <class T>
    static void grow(std::vector<T> &v, int64_t n) {
        if (static_cast<int64_t>(v.size()) < n) v.resize(n);
    }
};

void to_digits(const quip_layer &l, const Backend &b, Workspace &w, int64_t t, int thread) {
    int16_t *q = w.q.data() + thread * w.columns;
    std::fill(q + l.n, q + w.columns, 0);
    w.activations[t] = b.quantize(w.in.data() + t * l.n, l.n, q);
    b.arrange(q, w.bytes, w.fields, w.digits.data() + t * w.size);
}

// V x / D of one vector, in w.in.
template <int DTYPE>
void gather(const quip_layer &l, const void *x, int64_t t, float *z) {
    for (int64_t i = 0; i < l.n; i++) {
        const int64_t j = l.V.perm ? l.V.perm[i] : i;
        z[i] = read(x, DTYPE, t * l.n + j);
        if (l.rescale) z[i] /= l.rescale[j];
    }
}

void enter(const quip_layer &l, const Backend &b, Workspace &w, const void *x, int64_t dtype, int64_t t, int thread) {
    float *z = w.in.data() + t * l.n;
    const auto f = dtype == QUIP_FLOAT32 ? gather<QUIP_FLOAT32> : dtype == QUIP_FLOAT16 ? gather<QUIP_FLOAT16> : gather<QUIP_BFLOAT16>;
    f(l, x, w.first + t, z);
    apply(l.V, b, z, w.spare.data() + thread * std::max(l.m, l.n));
}

// The product's integers as numbers, in w.out: C = (2 code - top) / top.
void to_floats(const quip_layer &l, Workspace &w, int64_t t, int64_t first, int64_t last) {
    const int64_t top = (1 << l.bits) - 1, offset = top * w.activations[t].sum;
    const double factor = w.activations[t].step * *l.scale / static_cast<double>(top);
    const int64_t *sums = w.sums.data() + t * l.m;
    float *out = w.out.data() + t * l.m;
    for (int64_t i = first; i < last; i++) out[i] = static_cast<float>(factor * static_cast<double>(2 * sums[i] - offset));
}

// U' of one vector, and the bias.
void leave(const quip_layer &l, const Backend &b, Workspace &w, void *y, int64_t dtype, int64_t t, int thread) {
    float *z = w.out.data() + t * l.m;
    undo(l.U, b, z, w.spare.data() + thread * std::max(l.m, l.n));
    for (int64_t i = 0; i < l.m; i++) {
        const int64_t j = l.U.perm ? l.U.perm[i] : i;
        write(y, dtype, (w.first + t) * l.m + j, l.bias ? z[i] + read(l.bias, l.bias_dtype, j) : z[i]);
    }
}

// Rows of the product that one thread computes, in multiples of 16.
void share(int64_t m, int thread, int threads, int64_t &first, int64_t &last) {
    const int64_t each = ((m + threads - 1) / threads + 15) / 16 * 16;
    first = std::min(m, thread * each);
    last = std::min(m, first + each);
}

// One after the other: `before` (to w.in), the digits, the product, `after` (from w.out). Vectors are shared out among
// threads before and after the product, rows during it.
template <class Before, class After>
void some(const quip_layer &l, const Backend &b, Workspace &w, int64_t batch, int64_t threads, Before before, After after) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
#endif
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
        const int thread = 0, team = 1;
#endif
        for (int64_t t = thread; t < batch; t += team) {
            before(b, w, t, thread);
            to_digits(l, b, w, t, thread);
        }
#if defined(_OPENMP)
#pragma omp barrier
#endif
        int64_t first, last;
        share(l.m, thread, team, first, last);
        b.multiply(l.codes + first * w.width, w.width, l.bits, last - first, w.digits.data(), w.size, batch,
                   w.sums.data() + first, l.m);
        for (int64_t t = 0; t < batch; t++) to_floats(l, w, t, first, last);
#if defined(_OPENMP)
#pragma omp barrier
#endif
        for (int64_t t = thread; t < batch; t += team) after(b, w, t, thread);
    }
}

template <class Before, class After>
int run(const quip_layer &l, int64_t batch, int64_t threads, Before before, After after) try {
    const Backend &b = *backend.load();
    threads = std::min(threads, 1 + l.m * width_of(l) / WORK);
    static thread_local Workspace room;
    Workspace &w = room;  // a reference, as each thread of the team below has a room of its own
    w.fit(l, b, std::min(batch, MOST), threads);
    for (; w.first < batch; w.first += MOST) some(l, b, w, std::min(batch - w.first, MOST), threads, before, after);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

}  // namespace

int quip_linear(const quip_layer *l, const void *x, void *y, int64_t batch, int64_t dtype, int64_t threads) {
    return run(
        *l, batch, threads,
        [=](const Backend &b, Workspace &w, int64_t t, int thread) { enter(*l, b, w, x, dtype, t, thread); },
        [=](const Backend &b, Workspace &w, int64_t t, int thread) { leave(*l, b, w, y, dtype, t, thread); });
}

int quip_multiply(const quip_layer *l, const float *x, float *y, int64_t batch, int64_t threads) {
    return run(
        *l, batch, threads,
        [=](const Backend &, Workspace &w, int64_t t, int) {
            const float *from = x + (w.first + t) * l->n;
            std::copy(from, from + l->n, w.in.data() + t * l->n);
        },
        [=](const Backend &, Workspace &w, int64_t t, int) {
            const float *from = w.out.data() + t * l->m;
            std::copy(from, from + l->m, y + (w.first + t) * l->m);
        });
}

uint64_t quip_read(const void *data, int64_t bytes, int64_t threads) {
    const int64_t lines = bytes / 64;
    uint64_t all = 0;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) reduction(^ : all)
#endif
    for (int64_t i = 0; i < lines; i++) {
        uint64_t line[8];
        std::memcpy(line, static_cast<const uint8_t *>(data) + 64 * i, 64);
        fetch(static_cast<const uint8_t *>(data) + 64 * i + 4096);
        for (uint64_t word : line) all ^= word;
    }
    return all;
}

const char *quip_backends(void) {
    static const std::string names = [] {
        std::string s;
        for (const Backend *b : ALL)
            if (b->runs_here()) s += (s.empty() ? "" : " ") + std::string(b->name);
        return s;
    }();
    return names.c_str();
}

int64_t quip_layer_size(void) { return sizeof(quip_layer); }

const char *quip_backend(void) { return backend.load()->name; }

int quip_use(const char *name) {
    for (const Backend *b : ALL)
        if (b->runs_here() && name == std::string(b->name)) {
            backend = b;
            return 0;
        }
    return 1;
}
