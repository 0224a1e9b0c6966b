// What the library offers: layers, groups of layers, a gated block, a norm. And what chooses the backend.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "backend.h"
#include "layer.h"
#include "numbers.h"
#include "quip.h"

namespace {

const Backend *const ALL[] = {&avx512_backend, &avx2_backend, &neon_backend, &portable_backend};

const Backend *best() {
    return *std::find_if(std::begin(ALL), std::end(ALL), [](const Backend *b) { return b->runs_here(); });
}

std::atomic<const Backend *> backend{best()};

constexpr int64_t MOST = 32;      // activations at a time
constexpr int64_t WORK = 65536;   // bytes of codes for which another thread pays, at least

thread_local Workspace rooms[2];  // each thread that calls has its own; its team works in that

// f(first, some) for up to MOST activations at a time. 0, or 1 if there is no memory.
template <class F>
int in_pieces(int64_t batch, F f) try {
    for (int64_t first = 0; first < batch; first += MOST) f(first, std::min(batch - first, MOST));
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

const void *vector_at(const void *x, int64_t dtype, int64_t i) {
    return static_cast<const char *>(x) + i * (dtype == QUIP_FLOAT32 ? 4 : 2);
}

void *vector_at(void *y, int64_t dtype, int64_t i) { return const_cast<void *>(vector_at(const_cast<const void *>(y), dtype, i)); }

}  // namespace

int quip_linears(const quip_layer *const *layers, int64_t count, const void *x, void *const *y, int64_t batch,
                 int64_t dtype, int64_t threads) {
    const Backend &b = *backend.load();
    const Group g{layers, count};
    threads = std::min(threads, 1 + g.bytes() / WORK);
    return in_pieces(batch, [&, &w = rooms[0]](int64_t first, int64_t some) {
        w.fit(g, b, some, threads);
        together(threads, [&](const Team &team) {
            const auto before = [&](int64_t t) {
                enter(g[0], b, w, vector_at(x, dtype, (first + t) * g[0].n), dtype, t, team.thread);
            };
            const auto after = [&](int64_t k, int64_t at, int64_t t) {
                leave(g[k], b, w, at, vector_at(y[k], dtype, (first + t) * g[k].m), dtype, t, team.thread);
            };
            product_of(g, b, w, some, team, before, after);
        });
    });
}

int quip_linear(const quip_layer *l, const void *x, void *y, int64_t batch, int64_t dtype, int64_t threads) {
    return quip_linears(&l, 1, x, &y, batch, dtype, threads);
}

int quip_gated(const quip_layer *gate, const quip_layer *up, const quip_layer *down, const void *x, void *y, int64_t batch,
               int64_t dtype, int64_t threads) {
    const Backend &b = *backend.load();
    const quip_layer *const pair[] = {gate, up};
    const Group outer{pair, 2}, inner{&down, 1};
    const int64_t k = down->n;
    threads = std::min(threads, 1 + outer.bytes() / WORK);
    static thread_local std::vector<float> room;  // (batch, 2, k)
    std::vector<float> &hidden = room;
    return in_pieces(batch, [&, &w = rooms[0], &v = rooms[1]](int64_t first, int64_t some) {
        w.fit(outer, b, some, threads);
        v.fit(inner, b, some, threads);
        Workspace::grow(hidden, 2 * some * k);
        together(threads, [&](const Team &team) {
            const auto before = [&](int64_t t) {
                enter(*gate, b, w, vector_at(x, dtype, (first + t) * gate->n), dtype, t, team.thread);
            };
            const auto between = [&](int64_t i, int64_t at, int64_t t) {
                leave(*pair[i], b, w, at, hidden.data() + (2 * t + i) * k, QUIP_FLOAT32, t, team.thread);
            };
            product_of(outer, b, w, some, team, before, between);
            team.wait();
            const auto middle = [&](int64_t t) {
                float *h = hidden.data() + 2 * t * k;
                b.swiglu(h, h + k, k);
                enter(*down, b, v, h, QUIP_FLOAT32, t, team.thread);
            };
            const auto after = [&](int64_t, int64_t at, int64_t t) {
                leave(*down, b, v, at, vector_at(y, dtype, (first + t) * down->m), dtype, t, team.thread);
            };
            product_of(inner, b, v, some, team, middle, after);
        });
    });
}

void quip_rms_norm(const void *x, const void *weight, void *y, int64_t rows, int64_t n, double eps, int64_t dtype) {
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = r * n;
        float sums[16] = {};
        for (int64_t i = 0; i < n; i++) {
            const float v = read(x, dtype, at + i);
            sums[i % 16] += v * v;
        }
        double sum = 0;
        for (float s : sums) sum += s;
        const float factor = static_cast<float>(1 / std::sqrt(sum / static_cast<double>(n) + eps));
        for (int64_t i = 0; i < n; i++) {
            write(y, dtype, at + i, read(x, dtype, at + i) * factor);  // rounded, as the module does
            write(y, dtype, at + i, read(weight, dtype, i) * read(y, dtype, at + i));
        }
    }
}

int quip_multiply(const quip_layer *l, const float *x, float *y, int64_t batch, int64_t threads) {
    const Backend &b = *backend.load();
    const Group g{&l, 1};
    threads = std::min(threads, 1 + g.bytes() / WORK);
    return in_pieces(batch, [&, &w = rooms[0]](int64_t first, int64_t some) {
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
