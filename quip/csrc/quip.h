// The C interface of the CPU kernel: one layer, y = U' (s C) V x / D + b, on packed codes C (chapter 9 of the book).
#pragma once
#include <stdint.h>

#define QUIP_API extern "C" __attribute__((visibility("default")))

enum quip_dtype { QUIP_FLOAT32, QUIP_FLOAT16, QUIP_BFLOAT16 };

// One Kronecker product: entries offset ... offset + p q, folded to X (p, q), become L X R'.
struct quip_stage {
    int64_t offset, p, q;
    const float *L, *R, *Rt;  // (p, p), (q, q) and its transpose, row by row
};

// x -> x[perm], then the stages in order. No perm and no stage: the identity.
struct quip_transform {
    const int64_t *perm;  // (width), or null
    int64_t stages;
    quip_stage stage[2];
};

struct quip_layer {
    int64_t m, n, bits;
    const uint8_t *codes;  // (m, ceil(n / 64) * 8 * bits)
    const float *scale;    // (1)
    const float *rescale;  // (n), or null
    const void *bias;      // (m), or null
    int64_t bias_dtype;
    quip_transform V, U;  // of widths n and m
};

// y (batch, m) of x (batch, n), both of `dtype`, contiguous. 0, or 1 if there is no memory.
QUIP_API int quip_linear(const quip_layer *, const void *x, void *y, int64_t batch, int64_t dtype, int64_t threads);

// The same for `count` layers that share their input: all of one n, one number of bits, one V and no D. y[k] (batch, m_k).
QUIP_API int quip_linears(const quip_layer *const *, int64_t count, const void *x, void *const *y, int64_t batch,
                          int64_t dtype, int64_t threads);

// The same for many activations, x and y in bfloat16. With backend amx, what is between x and y is in bfloat16 too.
QUIP_API int quip_prompt(const quip_layer *, const void *x, void *y, int64_t batch, int64_t threads);

// y = down(silu(gate(x)) * up(x)), all in between in 32 bits; gate and up as for `quip_linears`.
QUIP_API int quip_gated(const quip_layer *gate, const quip_layer *up, const quip_layer *down, const void *x, void *y,
                        int64_t batch, int64_t dtype, int64_t threads);

// y (rows, n) = weight (n) * x / sqrt(mean(x^2) + eps), all of `dtype`, contiguous.
QUIP_API void quip_rms_norm(const void *x, const void *weight, void *y, int64_t rows, int64_t n, double eps, int64_t dtype);

// A decoder block: x + o(attention(q, k, v of norm(x))), and of that, y: it + down(silu(gate(norm(y))) * up(norm(y))).
struct quip_block {
    const quip_layer *q, *k, *v, *o, *gate, *up, *down;
    const void *before, *between;  // weights of the norms, of `dtype`
    double before_eps, between_eps, scaling;
    int64_t heads, shared, size;  // heads of q; of k and v; numbers in each, a multiple of 16
    int64_t dtype;                // of all activations: QUIP_FLOAT32 or QUIP_BFLOAT16
};

// For one token: q, k and v of its x, q and k turned by the angles of its position: cos and sin (size).
QUIP_API int quip_block_in(const quip_block *, const void *x, const void *cos, const void *sin, void *q, void *k, void *v,
                           int64_t threads);

// And the rest of the block, y of x and q. K and V: n keys and values for each head, head_step numbers from one head to
// the next, step from one key to the next.
QUIP_API int quip_block_out(const quip_block *, const void *x, const void *q, const void *K, const void *V, int64_t n,
                            int64_t head_step, int64_t step, void *y, int64_t threads);

// W (m, n) = U' (s C) V / D, of `dtype`: the layer's weights as an ordinary matrix. 0, or 1 if there is no memory.
QUIP_API int quip_dense(const quip_layer *, void *W, int64_t dtype, int64_t threads);

// y (batch, m) = s C x: the product alone, as the layer computes it. 0, or 1 if there is no memory.
QUIP_API int quip_multiply(const quip_layer *, const float *x, float *y, int64_t batch, int64_t threads);

// The exclusive or of all whole 64-bit words: a way to read memory as fast as it can be read.
QUIP_API uint64_t quip_read(const void *, int64_t bytes, int64_t threads);

// Names of the backends that this processor can run, best first, separated by spaces.
QUIP_API const char *quip_backends(void);

// Bytes of a quip_layer, to see that caller and library agree on it.
QUIP_API int64_t quip_layer_size(void);

// The one in use; at first the best.
QUIP_API const char *quip_backend(void);

// Use one of them from now on. 0, or 1 if it is not among them.
QUIP_API int quip_use(const char *name);
