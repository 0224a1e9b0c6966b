// Shapes of AMX's tiles, and blocks transposed for them. Included after a pragma that names the instructions.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

struct alignas(64) Shapes {  // what LDTILECFG reads
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // in a row of each tile
    uint8_t rows[16] = {};
};

inline void shape(const Shapes &s) {
    __asm__ volatile("" : : "r"(&s) : "memory");  // GCC takes the instruction to read eight bytes of it only
    _tile_loadconfig(&s);
}

// 16 vectors of 16 numbers of 32 bits become their columns.
void transpose(__m512i (&v)[16]) {
    __m512i t[16];
    UNROLLED for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLLED for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLLED for (int i = 0; i < 4; i++)
        UNROLLED for (int h = 0; h < 16; h += 8) {
            t[h + i] = _mm512_shuffle_i32x4(v[h + i], v[h + i + 4], 0x88);
            t[h + i + 4] = _mm512_shuffle_i32x4(v[h + i], v[h + i + 4], 0xDD);
        }
    UNROLLED for (int i = 0; i < 8; i++) {
        v[i / 4 * 4 + i % 4] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i / 4 * 4 + i % 4 + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    }
}

}  // namespace
