// Factors of transforms as AMX takes them, and room for what it makes.
#pragma once
#include <algorithm>
#include <vector>

#include "numbers.h"
#include "prompt.h"

namespace {

// Room that begins where a line of the cache does, as tiles like it, with some before it and some behind.
template <class T>
struct Lines {
    std::vector<T> own;

    void grow(int64_t n) {
        if (static_cast<int64_t>(own.size()) < n + 128) own.resize(n + 128);
    }

    T *data() { return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(own.data()) + 64) / 64 * 64); }
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

// A transform of strips: its products, one after the other.
struct Products {
    int64_t width;
    std::vector<Product> all;

    int64_t spare() const {
        int64_t most = 0;
        for (const Product &k : all) most = std::max(most, amx_spare(k.L.factor, k.R.factor));
        return most;
    }

    // Of a strip in a, in one of a and b: which, is the result. Both have room for BEHIND columns more, which become zero.
    uint16_t *operator()(uint16_t *a, uint16_t *b, uint16_t *spare) const {
        amx_clear(a, width, width + BEHIND);
        for (const Product &k : all) {
            amx_clear(b, width - width % 2, width + BEHIND);
            if (k.L.factor.rows * k.R.factor.rows < width) std::copy_n(a, (width + 1) / 2 * 2 * STRIP, b);
            amx_kronecker(k.L.factor, k.R.factor, k.offset, a, b, spare);
            std::swap(a, b);
        }
        return a;
    }

    static Products forward(int64_t width, const quip_transform &t) {  // V x or U x
        Products p{width};
        for (int64_t i = 0; i < t.stages; i++) p.all.push_back(Product::forward(t.stage[i]));
        return p;
    }

    static Products backward(int64_t width, const quip_transform &t) {  // V' x or U' x
        Products p{width};
        for (int64_t i = t.stages; i-- > 0;) p.all.push_back(Product::backward(t.stage[i]));
        return p;
    }
};

// Where a permutation takes numbers from when it goes back; empty for none.
std::vector<int64_t> inverse(const int64_t *perm, int64_t width) {
    std::vector<int64_t> back(perm ? width : 0);
    for (int64_t i = 0; i < static_cast<int64_t>(back.size()); i++) back[perm[i]] = i;
    return back;
}

template <class T>
const T *given(const std::vector<T> &v) { return v.empty() ? nullptr : v.data(); }

}  // namespace
