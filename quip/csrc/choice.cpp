// What chooses the backend; and how fast memory can be read.
#include <atomic>
#include <cstring>
#include <string>

#include "layer.h"

namespace {

const Backend *const ALL[] = {&amx_backend, &avx512_backend, &avx2_backend, &neon_backend, &portable_backend};

const Backend *best() {
    return *std::find_if(std::begin(ALL), std::end(ALL), [](const Backend *b) { return b->runs_here(); });
}

std::atomic<const Backend *> backend{best()};

}  // namespace

const Backend &chosen() { return *backend.load(); }

uint64_t quip_read(const void *data, int64_t bytes, int64_t threads) {
    constexpr int64_t STREAMS = 4;  // at a time, as rows of codes: one alone is slower
    const int64_t part = bytes / 64 / STREAMS;
    uint64_t all = 0;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) reduction(^ : all)
#endif
    for (int64_t i = 0; i < STREAMS * part; i++) {
        const uint8_t *at = static_cast<const uint8_t *>(data) + 64 * (i % STREAMS * part + i / STREAMS);
        uint64_t line[8];
        std::memcpy(line, at, 64);
        fetch(at + 8192);
        for (uint64_t word : line) all ^= word;
    }
    for (int64_t i = 8 * STREAMS * part; i < bytes / 8; i++) {
        uint64_t word;
        std::memcpy(&word, static_cast<const uint8_t *>(data) + 8 * i, 8);
        all ^= word;
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
