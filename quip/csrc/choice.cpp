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
    const int64_t lines = bytes / 64;
    uint64_t all = 0;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) reduction(^ : all)
#endif
    for (int64_t i = 0; i < lines; i++) {
        uint64_t line[8];
        std::memcpy(line, static_cast<const uint8_t *>(data) + 64 * i, 64);
        fetch(static_cast<const uint8_t *>(data) + 64 * i + 8192);
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
