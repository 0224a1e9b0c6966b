// Codes of a long prompt with AMX: they become odd numbers of 16 bits, exactly, a panel of rows at a time.
#include "backend.h"
#include "prompt.h"

#if defined(HAS_AMX)
#include "tiles.h"

namespace {

template <int BITS>
constexpr int64_t COPIES = BITS == 4 ? 2 : 4;  // of a group's bytes that fill a vector, one for each code in a byte

// Which of a group's 64 columns is number k of its tile t: the order in which codes are found.
template <int BITS>
constexpr int64_t column(int64_t t, int64_t k) {
    return BITS == 4 ? 4 * (k % 16) + 2 * t + k / 16 : 8 * (k % 8) + 4 * t + k / 8;
}

// The odd numbers, of 16 bits; by how much each copy of a group's bytes is shifted; and where each column is found then.
template <int BITS>
struct Tables {
    alignas(64) uint16_t numbers[32] = {}, shifts[2][32] = {}, high_shifts[2][32] = {}, order[64] = {};

    constexpr Tables() {
        constexpr int SIZE = BITS == 4 ? 4 : 2, TOP = (1 << BITS) - 1;
        for (int i = 0; i < 32; i++) {
            const int number = 2 * (i & TOP) - TOP, size = number < 0 ? -number : number;
            int exponent = 0;
            while (size >> (exponent + 1)) exponent++;
            numbers[i] = (number < 0) << 15 | (127 + exponent) << 7 | (size - (1 << exponent)) << (7 - exponent);
            for (int t = 0; t < 2; t++) {
                high_shifts[t][i] = t * COPIES<BITS> + i / (32 / COPIES<BITS>);
                shifts[t][i] = SIZE * high_shifts[t][i];
                order[column<BITS>(t, i)] = 32 * t + i;
            }
        }
    }
};

// Groups of codes as odd numbers. A group's bytes are repeated so that they fill a vector, and each copy is shifted to another of
// its codes; the lowest bits of every 16 then choose the number. What does not change stays in registers.
template <int BITS>
struct Unpacker {
    static constexpr Tables<BITS> tables{};
    const __m512i numbers = table(tables.numbers), shifts[2] = {table(tables.shifts[0]), table(tables.shifts[1])};
    const __m512i high_shifts[2] = {table(tables.high_shifts[0]), table(tables.high_shifts[1])};

    Unpacker() {}  // one that is implicit would be compiled without the instructions of this file

    static __m512i table(const uint16_t *p) { return _mm512_load_si512(p); }

    // Group g of a row, in the order of `column`.
    inline void operator()(const uint8_t *row, int64_t groups, int64_t g, __m512i (&out)[2]) const {
        const uint8_t *p = row + g * (BITS == 4 ? 32 : 16);
        const __m512i v = BITS == 4 ? _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))
                                    : _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        __m512i h = v;
        if (BITS == 3) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(row + groups * 16 + g * 8));
            h = _mm512_slli_epi16(_mm512_broadcast_i32x4(_mm_cvtepu8_epi16(bytes)), 2);
        }
        for (int t = 0; t < 2; t++) {
            __m512i code = _mm512_srlv_epi16(v, shifts[t]);
            if (BITS == 3)  // bits 0 and 1 of code, bit 2 of the shifted high bits
                code = _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), code, _mm512_srlv_epi16(h, high_shifts[t]), 0xCA);
            out[t] = _mm512_permutexvar_epi16(code, numbers);
        }
    }
};

// A panel: groups g ... g + deep of up to ROWS rows of codes, in tiles of 16 rows and 32 columns; those of one step together.
template <int BITS>
void fill(const uint8_t *codes, int64_t groups, int64_t rows, int64_t g, int64_t deep, uint16_t *panel) {
    const Unpacker<BITS> unpack;
    const int64_t width = groups * 8 * BITS;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t h = 0; h < deep; h++) {
            __m512i v[2];
            unpack(codes + i * width, groups, g + h, v);
            _mm512_store_si512(panel + (2 * h * ROWS + i) * 32, v[0]);
            _mm512_store_si512(panel + ((2 * h + 1) * ROWS + i) * 32, v[1]);
        }
}

// Three tiles of sums.
#define STORE(NAME, A, B, C)             \
    inline void NAME(float *sums) {      \
        _tile_stored(A, sums, 64);       \
        _tile_stored(B, sums + 256, 64); \
        _tile_stored(C, sums + 512, 64); \
    }
STORE(store_even, 0, 1, 2)
STORE(store_odd, 3, 4, 5)

// A step: 32 columns of a panel and a strip.
#define STEP(A, B, C)                 \
    _tile_loadd(6, z, 64);            \
    _tile_loadd(7, panel, 64);        \
    _tile_dpbf16ps(A, 7, 6);          \
    _tile_loadd(7, panel + 512, 64);  \
    _tile_dpbf16ps(B, 7, 6);          \
    _tile_loadd(7, panel + 1024, 64); \
    _tile_dpbf16ps(C, 7, 6);          \
    panel += ROWS * 32, z += 512;

// A panel times a strip in three tiles A, B and C, added to sums unless these are new. The next does so in three others and
// stores these meanwhile, so that neither waits for the other; here BEFORE stores those of the one before to `last`, if any.
#define TIMES_STRIP(NAME, A, B, C, BEFORE)                                                                         \
    void NAME(const uint16_t *panel, const uint16_t *z, int64_t groups, bool add, const float *sums, float *last) { \
        if (add) {                                                                                                 \
            _tile_loadd(A, sums, 64);                                                                              \
            _tile_loadd(B, sums + 256, 64);                                                                        \
            _tile_loadd(C, sums + 512, 64);                                                                        \
        } else {                                                                                                   \
            _tile_zero(A);                                                                                         \
            _tile_zero(B);                                                                                         \
            _tile_zero(C);                                                                                         \
        }                                                                                                          \
        STEP(A, B, C)                                                                                              \
        if (last) BEFORE(last);                                                                                    \
        STEP(A, B, C)                                                                                              \
        for (int64_t g = 1; g < groups; g++) {                                                                     \
            STEP(A, B, C)                                                                                          \
            STEP(A, B, C)                                                                                          \
        }                                                                                                          \
    }
TIMES_STRIP(times_even, 0, 1, 2, store_odd)
TIMES_STRIP(times_odd, 3, 4, 5, store_even)

void sums_to(const float *sums, int64_t rows, float factor, uint16_t *out) {
    const auto scaled = [&](int64_t i) { return _mm512_mul_ps(row(sums, i), _mm512_set1_ps(factor)); };
    int64_t i = 0;
    for (; i + 1 < rows; i += 2) put(out + i * STRIP, narrow(scaled(i), scaled(i + 1)));
    if (i < rows) put(out + i * STRIP, narrow(scaled(i), _mm512_setzero_ps()));
}

// Brings part i of `parts` of `count` lines, `apart` bytes from each other, closer: into the first cache (3) or the second (2).
template <int CACHE>
inline void bring_closer(const void *from, int64_t apart, int64_t count, int64_t i, int64_t parts) {
    for (int64_t k = i * count / parts; k < (i + 1) * count / parts; k++)
        __builtin_prefetch(static_cast<const char *>(from) + k * apart, 0, CACHE);
}

// A few groups at a time: a panel of codes after the other with all strips. Meanwhile the next panel's codes and the next
// groups of the strips come closer.
template <int BITS>
void multiply(const uint8_t *codes, int64_t groups, int64_t count, const uint16_t *z, int64_t strips, float factor,
              uint16_t *panel, float *sums, uint16_t *out, int64_t stride) {
    const int64_t apart = groups * 64 * STRIP, pieces = (groups + DEEP - 1) / DEEP, deep = (groups + pieces - 1) / pieces;
    const int64_t width = groups * 8 * BITS, blocks = (count + ROWS - 1) / ROWS, each = ROWS * STRIP;
    constexpr int64_t EACH = BITS == 4 ? 32 : 16;  // bytes of a group; its high bits at 3 bits come as they may
    for (int64_t g = 0; g < groups; g += deep)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t here = std::min(deep, groups - g), r = b * ROWS, rows = std::min(ROWS, count - r);
            const int64_t after = g + here < groups ? g + here : 0;
            float *to = sums + r * strips * STRIP;  // of one strip after the other
            const auto done = [&](int64_t s) {
                if (!after) sums_to(to + s * each, rows, factor, out + s * stride + r * STRIP);
            };
            fill<BITS>(codes + r * width, groups, rows, g, here, panel);
            published();
            const uint8_t *next = b + 1 < blocks ? codes + (r + ROWS) * width + g * EACH : codes + after * EACH;
            for (int64_t s = 0; s < strips; s++) {
                bring_closer<3>(next, width, ROWS, s, strips);
                bring_closer<2>(z + s * apart + after * 64 * STRIP, 64, 32 * deep, b, blocks);
                const auto times = s % 2 ? times_odd : times_even;
                times(panel, z + s * apart + g * 64 * STRIP, here, g > 0, to + s * each, s ? to + (s - 1) * each : nullptr);
                if (s) done(s - 1);
            }
            strips % 2 ? store_even(to + (strips - 1) * each) : store_odd(to + (strips - 1) * each);
            done(strips - 1);
        }
}

// A strip as the product reads it: a tile's neighbours are APART columns from each other, and so on with the next two.
template <int BITS>
void arrange(const uint16_t *strip, int64_t groups, uint16_t *z) {
    constexpr int64_t APART = column<BITS>(0, 1);
    for (int64_t g = 0; g < groups; g++, strip += 64 * STRIP, z += 64 * STRIP)
        for (int64_t t = 0; t < 2; t++)
            for (int64_t k = 0; k < 32; k += 2) {
                const int64_t c = column<BITS>(t, k);
                if (c % 2) continue;  // comes with the one before
                const __m512i a = pair(strip + c * STRIP), b = pair(strip + (c + APART) * STRIP);
                put(z + (32 * t + k) * STRIP, lower(a, b));
                put(z + (32 * t + k + 32 / COPIES<BITS>) * STRIP, upper(a, b));
            }
}

// Group g of all rows of codes, to four strips.
template <int BITS>
void unpack_group(const uint8_t *codes, int64_t groups, int64_t rows, int64_t g, uint16_t *strips, int64_t stride) {
    const Unpacker<BITS> unpack;
    const auto columns = [&](int64_t i, int t) {  // half of them, in order; zeros after the last row
        __m512i v[2] = {};
        if (i < rows) unpack(codes + i * groups * 8 * BITS, groups, g, v);
        return _mm512_permutex2var_epi16(v[0], unpack.table(unpack.tables.order + 32 * t), v[1]);
    };
    for (int64_t i = 0; i < rows; i += 2)
        for (int t = 0; t < 2; t++) {
            const __m512i a = columns(i, t), b = columns(i + 1, t);
            put(strips + 2 * t * stride + i * STRIP, interleave(_mm512_castsi512_si256(a), _mm512_castsi512_si256(b)));
            put(strips + (2 * t + 1) * stride + i * STRIP,
                interleave(_mm512_extracti64x4_epi64(a, 1), _mm512_extracti64x4_epi64(b, 1)));
        }
}

}  // namespace

void amx_arrange(const uint16_t *strip, int64_t groups, int64_t bits, uint16_t *z) {
    bits == 4 ? arrange<4>(strip, groups, z) : arrange<2>(strip, groups, z);
}

void amx_multiply(const uint8_t *codes, int64_t groups, int64_t bits, int64_t count, const uint16_t *z, int64_t strips,
                  float factor, uint16_t *panel, float *sums, uint16_t *out, int64_t stride) {
    whole_tiles();
    (bits == 2 ? multiply<2> : bits == 3 ? multiply<3> : multiply<4>)(codes, groups, count, z, strips, factor, panel, sums,
                                                                       out, stride);
    _tile_release();
}

void amx_unpack(const uint8_t *codes, int64_t groups, int64_t bits, int64_t rows, int64_t g, uint16_t *strips, int64_t stride) {
    (bits == 2 ? unpack_group<2> : bits == 3 ? unpack_group<3> : unpack_group<4>)(codes, groups, rows, g, strips, stride);
}

#include "tiles_end.h"
#endif
