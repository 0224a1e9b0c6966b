// Factors of transforms as AMX takes them, and room for what it makes.
#pragma once
#include <algorithm>
#include <vector>

#include "numbers.h"
#include "prompt.h"

namespace {

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

    int64_t spare() const { return amx_spare(L.factor, R.factor); }

    void operator()(uint16_t *columns, uint16_t *spare) const {
        amx_kronecker(L.factor, R.factor, columns + offset * STRIP, spare);
    }

    static Product forward(const quip_stage &s) {
        return {s.offset, {s.L, s.p, s.p, s.p, 1}, {s.R, s.q, s.q, s.q, 1}};
    }

    static Product backward(const quip_stage &s) {
        return {s.offset, {s.L, s.p, s.p, 1, s.p}, {s.R, s.q, s.q, 1, s.q}};
    }
};

using Products = std::vector<Product>;

Products forward(const quip_transform &t) {  // of V x or U x
    Products all;
    for (int64_t i = 0; i < t.stages; i++) all.push_back(Product::forward(t.stage[i]));
    return all;
}

Products backward(const quip_transform &t) {  // of V' x or U' x
    Products all;
    for (int64_t i = t.stages; i-- > 0;) all.push_back(Product::backward(t.stage[i]));
    return all;
}

int64_t spare_of(const Products &all) {
    int64_t most = 0;
    for (const Product &k : all) most = std::max(most, k.spare());
    return most;
}

}  // namespace
