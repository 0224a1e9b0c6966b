// The transforms V and U: a permutation and Kronecker products, on one vector at a time.
#pragma once
#include "backend.h"
#include "quip.h"

// X -> L X R'
inline void forward(const quip_stage &s, const Backend &b, float *x, float *spare) {
    float *X = x + s.offset;
    b.product(X, s.q, 1, s.Rt, spare, s.q, s.p, s.q, s.q);
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
