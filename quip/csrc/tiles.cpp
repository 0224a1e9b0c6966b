// Long prompts with AMX for bfloat16: codes become odd numbers of 16 bits, exactly, a panel of rows at a time.
#include "backend.h"
#include "prompt.h"

#if defined(HAS_AMX)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

#include "amx.h"

namespace {

inline __m256i half(const uint16_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }

inline void put(uint16_t *p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), v); }

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

inline __m256i narrow(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }

inline __m512i narrow(__m512 a, __m512 b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }  // a, then b

// a0 b0 a1 b1 ... of the columns a and b, which are the halves of a vector; and back
inline __m512i interleave(__m512i columns) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, columns);
}

inline __m512i separate(__m512i pairs) {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22,
                                           20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_epi16(order, pairs);
}

inline __m512i interleave(__m256i a, __m256i b) {
    return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

// All tiles with 16 rows of 64 bytes.
void whole_tiles() {
    Shapes s;
    for (int i = 0; i < 8; i++) s.bytes[i] = 64, s.rows[i] = 16;
    shape(s);
}

// A factor times the columns in b, to out, in 32 bits: up to four blocks of 16 rows at a time.
void times(const Factor &f, const uint16_t *b, float *out) {
    const int64_t next = f.steps * 1024;
    for (int64_t r = 0; r < f.blocks; r += 4, out += 1024) {
        const int64_t blocks = f.blocks - r;
        const uint16_t *tiles = f.tiles + r * next, *from = b;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < f.steps; k++, tiles += 1024, from += 512) {
            _tile_loadd(7, from, 64);
            for (int64_t part = 0; part < 1024; part += 512) {
                _tile_loadd(4, tiles + part, 64);
                _tile_dpbf16ps(0, 4, 7);
                if (blocks > 1) {
                    _tile_loadd(5, tiles + next + part, 64);
                    _tile_dpbf16ps(1, 5, 7);
                }
                if (blocks > 2) {
                    _tile_loadd(4, tiles + 2 * next + part, 64);
                    _tile_dpbf16ps(2, 4, 7);
                }
                if (blocks > 3) {
                    _tile_loadd(5, tiles + 3 * next + part, 64);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        _tile_stored(0, out, 64);
        if (blocks > 1) _tile_stored(1, out + 256, 64);
        if (blocks > 2) _tile_stored(2, out + 512, 64);
        if (blocks > 3) _tile_stored(3, out + 768, 64);
    }
}

// `count` columns X as pairs, as `times` takes them.
void pair_up(const uint16_t *X, int64_t count, int64_t steps, uint16_t *b) {
    const __m256i zero = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + 1 < count; k += 2) _mm512_store_si512(b + k * STRIP, interleave(_mm512_loadu_si512(X + k * STRIP)));
    if (k < count) _mm512_store_si512(b + k * STRIP, interleave(half(X + k * STRIP), zero)), k += 2;
    for (; k < 32 * steps; k += 2) _mm512_store_si512(b + k * STRIP, _mm512_setzero_si512());
}

// Which of a group's 64 columns is number k of its tile t: the order in which `unpack` finds codes.
template <int BITS>
inline int64_t column(int64_t t, int64_t k) {
    return BITS == 4 ? 4 * (k % 16) + 2 * t + k / 16 : 8 * (k % 8) + 4 * t + k / 8;
}

template <int BITS>
void arrange_as(const uint16_t *columns, int64_t groups, uint16_t *z) {
    for (int64_t g = 0; g < groups; g++, columns += 64 * STRIP)
        for (int64_t t = 0; t < 2; t++)
            for (int64_t k = 0; k < 32; k += 2, z += 32)
                _mm512_storeu_si512(z, interleave(half(columns + column<BITS>(t, k) * STRIP),
                                                 half(columns + column<BITS>(t, k + 1) * STRIP)));
}

// The odd numbers, of 16 bits, and by how much each copy of a group's bytes is shifted.
template <int BITS>
struct Tables {
    alignas(64) uint16_t numbers[32] = {}, shifts[2][32] = {}, high_shifts[2][32] = {};

    constexpr Tables() {
        constexpr int SIZE = BITS == 4 ? 4 : 2, COPIES = 8 / SIZE, TOP = (1 << BITS) - 1;
        for (int i = 0; i < 32; i++) {
            const int number = 2 * (i & TOP) - TOP, size = number < 0 ? -number : number;
            int exponent = 0;
            while (size >> (exponent + 1)) exponent++;
            numbers[i] = (number < 0) << 15 | (127 + exponent) << 7 | (size - (1 << exponent)) << (7 - exponent);
            for (int t = 0; t < 2; t++) {
                high_shifts[t][i] = t * COPIES + i / (32 / COPIES);
                shifts[t][i] = SIZE * high_shifts[t][i];
            }
        }
    }
};

// Groups of a row of codes as odd numbers. A group's bytes are repeated so that they fill a vector, and each copy is
// shifted to another of its codes; the lowest bits of every 16 then choose the number from a table.
template <int BITS>
void unpack(const uint8_t *row, int64_t groups, int64_t first, int64_t last, uint16_t *out) {
    constexpr int SIZE = BITS == 4 ? 4 : 2;
    static constexpr Tables<BITS> tables;
    const __m512i numbers = _mm512_load_si512(tables.numbers);
    for (int64_t g = first; g < last; g++, out += 2 * 1024) {
        const uint8_t *p = row + g * 8 * SIZE;
        const __m512i v = BITS == 4 ? _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))
                                    : _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        __m512i h = v;
        if (BITS == 3) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(row + groups * 16 + g * 8));
            h = _mm512_slli_epi16(_mm512_broadcast_i32x4(_mm_cvtepu8_epi16(bytes)), 2);
        }
        for (int t = 0; t < 2; t++) {
            __m512i code = _mm512_srlv_epi16(v, _mm512_load_si512(tables.shifts[t]));
            if (BITS == 3)  // bits 0 and 1 of code, bit 2 of the shifted high bits
                code = _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), code,
                                                 _mm512_srlv_epi16(h, _mm512_load_si512(tables.high_shifts[t])), 0xCA);
            _mm512_store_si512(out + t * 1024, _mm512_permutexvar_epi16(code, numbers));
        }
    }
}

// Steps of 32 columns: 32 rows times one strip or two. To sums, (2 blocks of rows, 2 strips) of tiles, which `add` adds to.
template <bool TWO>
void tiles(const uint16_t *panel, const uint16_t *z, int64_t apart, int64_t steps, bool add, float *sums) {
    if (add) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(2, sums + 512, 64);
        if (TWO) _tile_loadd(1, sums + 256, 64);
        if (TWO) _tile_loadd(3, sums + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++, panel += 1024, z += 512) {
        _tile_loadd(4, panel, 64);
        _tile_loadd(6, z, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (TWO) {
            _tile_loadd(7, z + apart, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_loadd(5, panel + 512, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (TWO) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 512, 64);
    if (TWO) _tile_stored(1, sums + 256, 64);
    if (TWO) _tile_stored(3, sums + 768, 64);
}

void sums_to(const float *sums, int64_t count, float factor, uint16_t *out) {
    for (int64_t i = 0; i < count; i++)
        put(out + i * STRIP, narrow(_mm512_mul_ps(_mm512_load_ps(sums + 16 * i), _mm512_set1_ps(factor))));
}

}  // namespace

void amx_bring(const uint16_t *x, int64_t n, int64_t count, uint16_t *columns) {
    for (int64_t j = 0; j < n; j += 32, columns += 32 * STRIP) {
        const int64_t some = n - j < 32 ? n - j : 32;
        const __mmask32 valid = some == 32 ? ~0u : (1u << some) - 1;
        __m512i v[16] = {};
        for (int64_t t = 0; t < count; t++) v[t] = _mm512_maskz_loadu_epi16(valid, x + t * n + j);
        transpose(v);
        int64_t i = 0;
        for (; i + 1 < some; i += 2) _mm512_storeu_si512(columns + i * STRIP, separate(v[i / 2]));
        if (i < some) put(columns + i * STRIP, _mm512_castsi512_si256(separate(v[i / 2])));
    }
}

void amx_take(const uint16_t *columns, int64_t m, int64_t count, uint16_t *y) {
    for (int64_t j = 0; j < m; j += 32, columns += 32 * STRIP) {
        const int64_t some = m - j < 32 ? m - j : 32;
        const __mmask32 valid = some == 32 ? ~0u : (1u << some) - 1;
        __m512i v[16] = {};
        int64_t i = 0;
        for (; i + 1 < some; i += 2) v[i / 2] = interleave(_mm512_loadu_si512(columns + i * STRIP));
        if (i < some) v[i / 2] = interleave(half(columns + i * STRIP), _mm256_setzero_si256());
        transpose(v);
        for (int64_t t = 0; t < count; t++) _mm512_mask_storeu_epi16(y + t * m + j, valid, v[t]);
    }
}

void amx_gather(const uint16_t *from, const int64_t *perm, const float *divisor, int64_t n, uint16_t *to) {
    for (int64_t i = 0; i < n; i++) {
        const int64_t j = perm ? perm[i] : i;
        const __m256i v = half(from + j * STRIP);
        put(to + i * STRIP, divisor ? narrow(_mm512_div_ps(widen(v), _mm512_set1_ps(divisor[j]))) : v);
    }
}

void amx_scatter(const uint16_t *from, const int64_t *perm, const float *bias, int64_t m, uint16_t *to) {
    for (int64_t i = 0; i < m; i++) {
        const int64_t j = perm ? perm[i] : i;
        const __m256i v = half(from + i * STRIP);
        put(to + j * STRIP, bias ? narrow(_mm512_add_ps(widen(v), _mm512_set1_ps(bias[j]))) : v);
    }
}

// From one row of pairs to the next: a line of the cache more than it takes, since at a power of two all would share a
// few places of the smallest cache.
inline int64_t padded(const Factor &L) { return L.steps * 512 + 32; }

int64_t amx_spare(const Factor &L, const Factor &R) {
    const int64_t blocks = L.blocks > R.blocks ? L.blocks : R.blocks;
    return 8 * blocks * 256 + 4 * R.steps * 512 + R.rows * padded(L);
}

// Two at a time, in a pipeline: while some are multiplied, those after them become pairs, and those before them 16 bits.
// So tiles and vectors work at once, and nothing is loaded as a tile when it has just been stored, which would have to wait.
void amx_kronecker(const Factor &L, const Factor &R, uint16_t *X, uint16_t *spare) {
    const int64_t p = L.rows, q = R.rows, deep = padded(L), room = 256 * (L.blocks > R.blocks ? L.blocks : R.blocks);
    float *out = reinterpret_cast<float *>(spare);
    uint16_t *b = spare + 8 * room, *Y = b + 4 * R.steps * 512;
    const auto sums = [&](int64_t i) { return out + i % 4 * room; };
    const auto pairs = [&](int64_t i) { return b + i % 4 * R.steps * 512; };
    whole_tiles();
    for (int64_t i = 0; i < p + 4; i += 2) {
        for (int64_t h = i; h < i + 2 && h < p; h++) pair_up(X + h * q * STRIP, q, R.steps, pairs(h));
        for (int64_t h = i - 2; h >= 0 && h < i && h < p; h++) times(R, pairs(h), sums(h));
        if (i >= 4)
            for (int64_t j = 0, h = i - 4; j < q; j++) {
                const __m512 odd = h + 1 < p ? _mm512_load_ps(sums(h + 1) + 16 * j) : _mm512_setzero_ps();
                _mm512_store_si512(Y + j * deep + h * STRIP, interleave(narrow(_mm512_load_ps(sums(h) + 16 * j), odd)));
            }
    }
    for (int64_t i = (p + 1) / 2 * 2; i < 32 * L.steps; i += 2)
        for (int64_t j = 0; j < q; j++) _mm512_store_si512(Y + j * deep + i * STRIP, _mm512_setzero_si512());
    for (int64_t j = 0; j < q + 2; j += 2) {
        for (int64_t h = j; h < j + 2 && h < q; h++) times(L, Y + h * deep, sums(h));
        if (j >= 2)
            for (int64_t i = 0, h = j - 2; i < p; i++) {
                const __m512 first = _mm512_load_ps(sums(h) + 16 * i);
                uint16_t *to = X + (i * q + h) * STRIP;
                if (h + 1 < q)
                    _mm512_storeu_si512(to, narrow(first, _mm512_load_ps(sums(h + 1) + 16 * i)));
                else
                    put(to, narrow(first));
            }
    }
    _tile_release();
}

void amx_arrange(const uint16_t *columns, int64_t groups, int64_t bits, uint16_t *z) {
    bits == 4 ? arrange_as<4>(columns, groups, z) : arrange_as<2>(columns, groups, z);
}

void amx_multiply(const uint8_t *codes, int64_t groups, int64_t bits, int64_t count, const uint16_t *z, int64_t strips,
                  float factor, uint16_t *panel, float *sums, uint16_t *out, int64_t stride) {
    const auto f = bits == 2 ? unpack<2> : bits == 3 ? unpack<3> : unpack<4>;
    const int64_t apart = groups * 64 * STRIP, pieces = (groups + DEEP - 1) / DEEP, deep = (groups + pieces - 1) / pieces;
    const int64_t each = (strips + 1) / 2 * 1024;  // sums for 32 rows
    whole_tiles();
    for (int64_t g = 0; g < groups; g += deep) {
        const int64_t last = groups - g < deep ? groups : g + deep;
        for (int64_t r = 0; r < count; r += 32) {
            const int64_t some = count - r < 32 ? count - r : 32;
            for (int64_t i = 0; i < some; i++)
                f(codes + (r + i) * groups * 8 * bits, groups, g, last, panel + i / 16 * 512 + i % 16 * 32);
            for (int64_t s = 0; s < strips; s += 2) {
                const uint16_t *from = z + s * apart + g * 64 * STRIP;
                const auto step = s + 1 < strips ? tiles<true> : tiles<false>;
                step(panel, from, apart, 2 * (last - g), g > 0, sums + r / 32 * each + s * 512);
            }
        }
    }
    for (int64_t s = 0; s < strips; s++)
        for (int64_t r = 0; r < count; r += 16)
            sums_to(sums + r / 32 * each + s / 2 * 1024 + r % 32 / 16 * 512 + s % 2 * 256, count - r < 16 ? count - r : 16,
                    factor, out + s * stride + r * STRIP);
    _tile_release();
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif
#endif
