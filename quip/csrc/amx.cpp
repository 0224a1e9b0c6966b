// AMX: 16 activation vectors times 16 rows, 64 codes of each, in one instruction. A few vectors go the way of AVX-512,
// and so does everything but the product.
#include "backend.h"

#if defined(HAS_AMX)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,amx-tile,amx-int8")
#endif

#include "avx512.h"
#include "amx.h"

namespace {

constexpr int64_t FEW = 6;     // activation vectors for which AVX-512 is as fast
constexpr int64_t PANEL = 32;  // rows unpacked at a time, in two tiles
constexpr int64_t DEEP = 64;   // tiles of each 16 rows unpacked at a time: 128 KB in all, which stay in the cache

// Tiles 0 to 3: sums of 16 rows and one digit (vectors, 16); 4 and 5: digits (vectors, 64); 6 and 7: codes (16, 4 * 16).
void shape_tiles(int64_t vectors) {
    Shapes s;
    for (int i = 0; i < 8; i++) {
        s.bytes[i] = 64;
        s.rows[i] = i < 6 ? vectors : 16;
    }
    shape(s);
}

// Bytes first to last of up to 16 rows of codes as tiles: for every 64 bytes and every field, the tile whose row i holds
// the codes of bytes 4 i to 4 i + 3 of each row. The digits are in this order already. Tiles of 32 rows alternate.
template <int BITS>
void unpack(const uint8_t *codes, int64_t width, int64_t count, int64_t first, int64_t last, uint8_t *out) {
    constexpr int FIELDS = BITS == 4 ? 2 : 4;
    const int64_t bytes = BITS == 3 ? width / 3 * 2 : width;
    for (int64_t at = first; at < last; at += VECTOR, out += FIELDS * 2048) {
        Vec packed[16] = {}, high[16] = {};
        for (int64_t r = 0; r < count; r++) {
            const uint8_t *row = codes + r * width;
            packed[r] = load(row + at, bytes - at);
            if (BITS == 3) high[r] = load_high(row + bytes + at / 2, (bytes - at) / 2);
        }
        transpose(packed);
        if (BITS == 3) transpose(high);
        for (int k = 0; k < FIELDS; k++)
            for (int i = 0; i < 16; i++) {
                Vec code = field<FIELDS>(packed[i], k);
                if (BITS == 3) code = join_high(code, high[i], k);
                _mm512_store_si512(out + k * 2048 + i * 64, code);
            }
    }
}

// To sums (vectors, count), of tiles of both digits.
void combine(const int32_t *low, const int32_t *high, int64_t vectors, int64_t count, bool add, int64_t *sums,
             int64_t stride) {
    for (int64_t t = 0; t < vectors; t++, sums += stride)
        for (int64_t r = 0; r < count; r++)
            sums[r] = (add ? sums[r] : 0) + low[16 * t + r] + 256 * static_cast<int64_t>(high[16 * t + r]);
}

// `steps` pairs of tiles of codes, of 32 rows, times up to 16 activation vectors.
void tiles(const uint8_t *panel, int64_t steps, const int8_t *digits, int64_t size, int64_t vectors, int64_t count,
           bool add, int64_t *sums, int64_t stride) {
    alignas(64) int32_t out[4][256];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < steps; k++) {
        _tile_loadd(4, digits + k * 128, size);
        _tile_loadd(6, panel + k * 2048, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(5, digits + k * 128 + 64, size);
        _tile_dpbsud(1, 5, 6);
        _tile_loadd(7, panel + k * 2048 + 1024, 64);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, out[0], 64);
    _tile_stored(1, out[1], 64);
    _tile_stored(2, out[2], 64);
    _tile_stored(3, out[3], 64);
    combine(out[0], out[1], vectors, count < 16 ? count : 16, add, sums, stride);
    if (count > 16) combine(out[2], out[3], vectors, count - 16, add, sums + 16, stride);
}

template <int BITS>
void product_of(const uint8_t *codes, int64_t width, int64_t count, const int8_t *digits, int64_t size, int64_t batch,
                int64_t *sums, int64_t stride) {
    constexpr int64_t FIELDS = BITS == 4 ? 2 : 4, DEPTH = DEEP / FIELDS * VECTOR;  // bytes of a row
    alignas(64) uint8_t panel[DEEP * 2048];
    const int64_t bytes = BITS == 3 ? width / 3 * 2 : width;
    int64_t shaped = 0;
    for (int64_t r = 0; r < count; r += PANEL)
        for (int64_t at = 0; at < bytes; at += DEPTH) {
            const int64_t some = count - r < PANEL ? count - r : PANEL, last = bytes - at < DEPTH ? bytes : at + DEPTH;
            const int64_t steps = (last - at + VECTOR - 1) / VECTOR * FIELDS;
            unpack<BITS>(codes + r * width, width, some < 16 ? some : 16, at, last, panel);
            unpack<BITS>(codes + (r + 16) * width, width, some < 16 ? 0 : some - 16, at, last, panel + 1024);
            for (int64_t t = 0; t < batch; t += 16) {
                const int64_t vectors = batch - t < 16 ? batch - t : 16;
                if (vectors != shaped) shape_tiles(shaped = vectors);
                tiles(panel, steps, digits + t * size + at * FIELDS * 2, size, vectors, some, at > 0,
                      sums + t * stride + r, stride);
            }
        }
    if (shaped) _tile_release();
}

void multiply(const uint8_t *codes, int64_t width, int64_t bits, int64_t count, const int8_t *digits, int64_t size,
              int64_t batch, int64_t *sums, int64_t stride) {
    if (batch <= FEW) return avx512_backend.multiply(codes, width, bits, count, digits, size, batch, sums, stride);
    const auto f = bits == 2 ? product_of<2> : bits == 3 ? product_of<3> : product_of<4>;
    f(codes, width, count, digits, size, batch, sums, stride);
}

Quantized quantize(const float *z, int64_t n, int16_t *q) { return avx512_backend.quantize(z, n, q); }

void arrange(const int16_t *q, int64_t bytes, int64_t fields, int8_t *out) { avx512_backend.arrange(q, bytes, fields, out); }

void scale(const int64_t *sums, int64_t n, double factor, int64_t offset, float *out) {
    avx512_backend.scale(sums, n, factor, offset, out);
}

void product(const float *A, int64_t row_step, int64_t step, const float *B, float *C, int64_t to, int64_t rows,
             int64_t inner, int64_t columns) {
    avx512_backend.product(A, row_step, step, B, C, to, rows, inner, columns);
}

void swiglu(float *g, const float *u, int64_t n) { avx512_backend.swiglu(g, u, n); }

void attend(const float *q, int64_t heads, int64_t d, const void *K, const void *V, int64_t n, int64_t step, bool wide,
            float *scores, float *out) {
    avx512_backend.attend(q, heads, d, K, V, n, step, wide, scores, out);
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif

// The processor has it, and the system lets this process use it: its registers are large, and have to be asked for.
static bool runs_here() {
    unsigned a, b, c, d;
    if (!avx512_backend.runs_here() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (d & TILE) && (d & INT8) && (d & BF16) && __builtin_cpu_supports("avx512bf16") &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

const Backend amx_backend = {"amx", VECTOR, quantize, arrange, multiply, scale, product, swiglu, attend, runs_here};
#else
const Backend amx_backend = {"amx", 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, [] { return false; }};
#endif
