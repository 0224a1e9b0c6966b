// Reading and writing 32- and 16-bit floating point numbers, on any compiler.
#pragma once
#include <stdint.h>

#include <cstring>

#include "quip.h"

inline float from_bits(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline uint32_t to_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinite or NaN
    // as if it were a float with 10 bits of fraction; the factor mends the exponent, also of a subnormal number
    return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000u)));
}

inline uint16_t float_to_half(float f) {
    const uint32_t u = to_bits(f), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
    if (rest > 0x7f800000u) return sign | 0x7e00u;
    if (rest >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
    if (rest < 0x38800000u)  // subnormal: adding 0.5 lines the bits up and rounds them to even
        return sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u);
    return sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13;
}

inline float bfloat16_to_float(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bfloat16(float f) {
    const uint32_t u = to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return u >> 16 | 0x40u;  // NaN stays NaN
    return (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}

inline float read(const void *x, int64_t dtype, int64_t i) {
    if (dtype == QUIP_FLOAT32) return static_cast<const float *>(x)[i];
    const uint16_t h = static_cast<const uint16_t *>(x)[i];
    return dtype == QUIP_FLOAT16 ? half_to_float(h) : bfloat16_to_float(h);
}

inline void write(void *y, int64_t dtype, int64_t i, float f) {
    if (dtype == QUIP_FLOAT32)
        static_cast<float *>(y)[i] = f;
    else
        static_cast<uint16_t *>(y)[i] = dtype == QUIP_FLOAT16 ? float_to_half(f) : float_to_bfloat16(f);
}
