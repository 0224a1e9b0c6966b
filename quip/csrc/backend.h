// What differs from processor to processor: the inner loops. Each backend compiles `multiply.inc` for its instructions.
#pragma once
#include <stdint.h>

// An activation vector is step * q, q integers with this sum.
struct Quantized {
    double step;
    int64_t sum;
};

struct Backend {
    const char *name;
    int vector;  // bytes in a vector
    // q (n) of activations z (n)
    Quantized (*quantize)(const float *z, int64_t n, int16_t *q);
    // the two digits of q, for rows of `bytes` bytes with `fields` codes each, as `multiply` reads them
    void (*arrange)(const int16_t *q, int64_t bytes, int64_t fields, int8_t *out);
    // sums (batch, rows; `stride` apart): code times activation, over all columns, exactly; a row of codes has `width`
    // bytes, an activation vector `size` bytes of digits
    void (*multiply)(const uint8_t *codes, int64_t width, int64_t bits, int64_t rows, const int8_t *digits,
                     int64_t size, int64_t batch, int64_t *sums, int64_t stride);
    // out (n) = factor * (2 sums - offset)
    void (*scale)(const int64_t *sums, int64_t n, double factor, int64_t offset, float *out);
    // C (rows, columns), rows `to` apart, = A (rows, inner) B (inner, columns); A(i, k) at A[i * row_step + k * step]
    void (*product)(const float *A, int64_t row_step, int64_t step, const float *B, float *C, int64_t to, int64_t rows,
                    int64_t inner, int64_t columns);
    // g (n) -> silu(g) u
    void (*swiglu)(float *g, const float *u, int64_t n);
    // out (heads, d) = softmax(q K') V of q (heads, d), with n keys and values that are `step` numbers apart, all float
    // (`wide`) or bfloat16; scores (heads, n) is room. d is a multiple of 16.
    void (*attend)(const float *q, int64_t heads, int64_t d, const void *K, const void *V, int64_t n, int64_t step,
                   bool wide, float *scores, float *out);
    bool (*runs_here)();
};

// Short loops over arrays that must become registers.
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#endif

inline void fetch(const void *p) { __builtin_prefetch(p, 0, 2); }  // into the second cache; never faults

extern const Backend amx_backend, avx512_backend, avx2_backend, neon_backend, portable_backend;

// Whether the compiler knows AMX.
#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if defined(__clang__) ? __clang_major__ >= 17 : __has_include(<amxint8intrin.h>) && __has_include(<amxbf16intrin.h>) && __has_include(<avx512bf16intrin.h>)
#define HAS_AMX
#endif
#endif
