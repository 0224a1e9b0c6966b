// The transforms V and U: a permutation and Kronecker products, on one vector at a time.
#pragma once
#include "backend.h"
#include "quip.h"

inline void transpose(const float *X, float *out, int64_t rows, int64_t columns) {  // (rows, columns) -> (columns, rows)
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < rows; i++) out[j * rows + i] = X[i * columns + j];
}

// X -> L X R', as (R X')' and then L times it: so both products read their second matrix along its rows.
inline void forward(const quip_stage &s, const Backend &b, float *x, float *spare) {
    float *X = x + s.offset;
    transpose(X, spare, s.p, s.q);
    b.product(s.R, s.q, 1, spare, X, s.p, s.q, s.q, s.p);
    transpose(X, spare, s.q, s.p);
    b.product(s.L, s.p, 1, spare, X, s.q, s.p, s.p, s.q);
}

// X -> L' X R
inline void backward(const quip_stage &s, const Backend &b, float *x, float *spare) {
    float *X = x + s.offset;
    b.product(X, s.q, 1, s.R, spare, s.q, s.p, s.q, s.q);
    b.product(s.L, 1, s.p, spare, X, s.q, s.p, s.p, s.q);
}

inline void apply(const quip_transform &V, const Backend &b, float *x, float *spare) {
    for (int64_t i = 0; i < V.stages; i++) forward(V.stage[i], b, x, spare);
}

inline void undo(const quip_transform &U, const Backend &b, float *x, float *spare) {
    for (int64_t i = U.stages; i-- > 0;) backward(U.stage[i], b, x, spare);
}
