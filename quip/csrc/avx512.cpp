// AVX-512 with VNNI: 64 products of a code and a digit in one instruction, summed up in 32 bits.
#include "backend.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#endif

#include "avx512.h"

namespace {

#define APART 1
constexpr int ROWS = 4, TILE_ROWS = 2, TILE = 4, LANES = 16;
using Sum = __m512i;

inline void multiply_add(Sum &sum, Vec code, Vec digit) { sum = _mm512_dpbusd_epi32(sum, code, digit); }

// sum += part / 2^shift, without a remainder
inline void add_part(Sum &sum, Sum part, int shift) { sum = _mm512_add_epi32(sum, _mm512_srai_epi32(part, shift)); }

template <int R, int T>
inline void flush(Sum (&)[R][T][2], int64_t) {}

// low + 256 high, in each lane within 32 bits for up to 65536 columns; all lanes together may need more.
inline int64_t total(Sum low, Sum high) {
    const __m512i sum = _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
    const __m512i wide = _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum)),
                                          _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum, 1)));
    return _mm512_reduce_add_epi64(wide);
}

}  // namespace

#include "multiply.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif

static bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

const Backend avx512_backend = {"avx512", VECTOR, quantize, arrange, multiply, scale, product, swiglu, attend, runs_here};
#else
const Backend avx512_backend = {"avx512", 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, [] { return false; }};
#endif
