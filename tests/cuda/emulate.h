// Runs CUDA C++ kernels on the CPU, to find what is wrong with them. Stands in for the part of quip.cuda that is
// written in PTX. One thread of a block runs at a time, as a fiber; which one comes next, a seed decides: at a barrier,
// at an exchange within a warp, and now and then at any access to memory. What stops a kernel with a message:
// an access outside a buffer or not aligned; shared memory that is read before it is written; one word of memory
// touched by two threads, by one of them to write, with no barrier between; a barrier or an exchange that not all reach;
// what the kernel before may still be writing, read without waiting for it; dynamic arrays that overlap.
#include <ucontext.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

struct dim3 { int x, y, z; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum State { READY, BARRIER, EXCHANGE, DONE };
const int STACK = 65536, MOST = 1024;
struct Fiber { ucontext_t context; State state; int line; bool waited; };
struct Warp { int arrived, line; unsigned generation; uint32_t slots[2][32][8]; };
struct Memory {
    const char* name;
    long long start = -1, end = -1;  // in dynamic memory, once it has been given a place there
    virtual void poison() = 0;
};

static Fiber fibers[MOST];
static Warp warps[MOST / 32];
static std::vector<char> stacks(size_t(STACK) * MOST);
static std::vector<Memory*> shared;  // every array in shared memory that a kernel has declared
static uint32_t rng_state;
static ucontext_t scheduler;
static char message[400];
static int current, arrived, epoch, dynamic_bytes;
static bool in_order;
static void (*body)(void*);
static void* body_arguments;

static uint32_t rng() {  // xorshift
    rng_state ^= rng_state << 13, rng_state ^= rng_state >> 17, rng_state ^= rng_state << 5;
    return rng_state;
}

static void leave() { swapcontext(&fibers[current].context, &scheduler); }

static void fail(const char* format, ...) {
    int n = snprintf(message, sizeof message, "block (%d, %d), thread %d: ", blockIdx.x, blockIdx.y, threadIdx.x);
    va_list list;
    va_start(list, format);
    vsnprintf(message + n, sizeof message - n, format, list);
    va_end(list);
    leave();  // for good
}

static void access() {
    if (!in_order && rng() % 64 == 0) leave();
}

static void barrier(int line) {
    for (int i = 0; i < blockDim.x; i++) {
        if (fibers[i].state == DONE) fail("waits at the barrier of line %d, thread %d has ended", line, i);
        if (fibers[i].state == BARRIER && fibers[i].line != line)
            fail("is at the barrier of line %d, thread %d at that of line %d", line, i, fibers[i].line);
    }
    fibers[current].state = BARRIER, fibers[current].line = line;
    if (++arrived == blockDim.x) {
        arrived = 0, epoch++;
        for (int i = 0; i < blockDim.x; i++) fibers[i].state = READY;
    }
    leave();
}

// Lays down up to eight words of this lane, waits for all of its warp, and returns what all 32 have laid down.
static uint32_t (*exchange(const uint32_t* words, int count, int line))[8] {
    Warp& warp = warps[current / 32];
    if (warp.arrived && warp.line != line) fail("lanes of one warp exchange at lines %d and %d", line, warp.line);
    for (int i = current / 32 * 32; i < current / 32 * 32 + 32; i++)
        if (fibers[i].state == DONE) fail("an exchange at line %d lacks lane %d, which has ended", line, i % 32);
    warp.line = line;
    auto slots = warp.slots[warp.generation % 2];
    memcpy(slots[current % 32], words, 4 * count);
    if (++warp.arrived == 32) {
        warp.arrived = 0, warp.generation++;
        for (int i = current / 32 * 32; i < current / 32 * 32 + 32; i++) fibers[i].state = READY;
    } else {
        fibers[current].state = EXCHANGE;
    }
    leave();
    return slots;
}

static float shuffle_xor(unsigned mask, float value, int lanes, int line) {
    if (mask != ~0u) fail("an exchange of line %d is not of all lanes", line);
    uint32_t word;
    memcpy(&word, &value, 4);
    auto slots = exchange(&word, 1, line);
    memcpy(&value, slots[current % 32 ^ lanes], 4);
    return value;
}

struct Trace { int writer = -1, write_epoch = -1, reader = -1, read_epoch = -1; };  // of one element in shared memory

template <class T>
struct Shared : Memory {
    std::vector<T> values;
    std::vector<Trace> traces;
    int forgotten = -1;  // the epoch in which it was last declared to be free
    Shared(const char* label, long long count) { name = label, shared.push_back(this), resize(count); }
    void resize(long long count) {
        values.resize(count), traces.resize(count);
        memset((void*)values.data(), 0xff, count * sizeof(T));  // NaN
        for (auto& trace : traces) trace = Trace();
    }
    void poison() override { resize(values.size()), start = end = forgotten = -1; }
    void place(long long first, long long count) {  // by the first thread of a block that comes here
        if (start < 0) {
            resize(count);
            start = first, end = first + count * sizeof(T);
            if (start % alignof(T) || start < 0 || end > dynamic_bytes)
                fail("shared %s takes bytes %lld to %lld of %d", name, start, end, dynamic_bytes);
            for (auto other : shared)
                if (other != this && other->start < end && start < other->end)
                    fail("shared %s and %s overlap", name, other->name);
        } else if (first != start || count != (long long)values.size()) {
            fail("shared %s has another place or size for another thread", name);
        }
    }
    void forget() {  // by the first thread that comes here after a barrier
        if (forgotten != epoch) resize(values.size()), forgotten = epoch;
    }
    long long wide(long long i, int bytes) {
        if (i * (long long)sizeof(T) % bytes) fail("%d bytes at entry %lld of shared %s: not aligned", bytes, i, name);
        return bytes / sizeof(T);
    }
    struct Ref {
        Shared& array;
        long long i;
        operator T() const { return array.read(i); }
        void operator=(const T& value) { array.write(i, value); }
    };
    Ref operator[](long long i) { return {*this, i}; }
    void check(long long i) {
        access();
        long long count = values.size();
        if (i < 0 || i >= count) fail("entry %lld of shared %s, which has %lld", i, name, count);
    }
    T read(long long i) {
        check(i);
        Trace& trace = traces[i];
        if (trace.writer < 0) fail("reads entry %lld of shared %s, which nobody has written", i, name);
        if (trace.writer != current && trace.write_epoch == epoch)
            fail("reads entry %lld of shared %s, which thread %d writes: no barrier between", i, name, trace.writer);
        trace.reader = trace.read_epoch == epoch && trace.reader != current ? MOST : current;  // MOST: several
        trace.read_epoch = epoch;
        return values[i];
    }
    void write(long long i, const T& value) {
        check(i);
        Trace& trace = traces[i];
        if (trace.writer >= 0 && trace.writer != current && trace.write_epoch == epoch)
            fail("writes entry %lld of shared %s, as thread %d does: no barrier between", i, name, trace.writer);
        if (trace.read_epoch == epoch && trace.reader != current)
            fail("writes entry %lld of shared %s, which another thread reads: no barrier between", i, name);
        trace.writer = current, trace.write_epoch = epoch;
        values[i] = value;
    }
};

static int identity() { return (blockIdx.y * gridDim.x + blockIdx.x) * MOST + threadIdx.x + 1; }

// A buffer in global memory. `owner` has, for each element, the one thread that has written it.
template <class T>
struct Global {
    T* base;
    long long count;
    int* owner;
    explicit operator bool() const { return base; }
    void check(long long i) const {
        access();
        if (i < 0 || i >= count) fail("element %lld of a buffer of %lld", i, count);
    }
    struct Ref {
        const Global& buffer;
        long long i;
        void own() const {
            buffer.check(i);
            if (buffer.owner[i] && buffer.owner[i] != identity()) fail("element %lld is another thread's", i);
        }
        operator T() const { return own(), buffer.base[i]; }
        void operator=(const T& value) const { own(), buffer.owner[i] = identity(), buffer.base[i] = value; }
    };
    Ref operator[](long long i) const { return {*this, i}; }
};
template <class T>
struct Global<const T> {
    const T* base;
    long long count;
    explicit operator bool() const { return base; }
    T operator[](long long i) const {
        access();
        if (i < 0 || i >= count) fail("element %lld of a buffer of %lld", i, count);
        return base[i];
    }
};
// What the kernel before this one may still be writing.
template <class T>
struct Late : Global<const T> {
    static void check() {
        if (!fibers[current].waited) fail("reads what the kernel before may still be writing");
    }
    T operator[](long long i) const { return check(), Global<const T>::operator[](i); }
};

struct Argument { void* pointer; long long bytes; double number; };
static std::vector<std::vector<int>> owners;

template <class T> struct Get { static T of(const Argument& a) { return T(a.number); } };
template <class T> struct Get<Global<T>> {
    static Global<T> of(const Argument& a) {
        owners.emplace_back(a.pointer ? a.bytes / sizeof(T) : 0);
        return {(T*)a.pointer, a.bytes / (long long)sizeof(T), owners.back().data()};
    }
};
template <class T> struct Get<Global<const T>> {
    static Global<const T> of(const Argument& a) { return {(const T*)a.pointer, a.bytes / (long long)sizeof(T)}; }
};

template <class T> struct Get<Late<T>> {
    static Late<T> of(const Argument& a) { return {Get<Global<const T>>::of(a)}; }
};

static void thread_main() {
    body(body_arguments);
    fibers[current].state = DONE;
    leave();
}

static void run_block() {
    arrived = epoch = 0;
    for (auto memory : shared) memory->poison();
    memset(warps, 0, sizeof warps);
    for (int i = 0; i < blockDim.x; i++) {
        Fiber& fiber = fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = &stacks[size_t(i) * STACK];
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, thread_main, 0);
        fiber.state = READY, fiber.waited = false;
    }
    for (;;) {
        int start = in_order ? current : rng() % blockDim.x, done = 0, next = -1;
        for (int i = 0; i < blockDim.x && next < 0; i++) {
            int candidate = (start + i) % blockDim.x;
            if (fibers[candidate].state == READY) next = candidate;
            done += fibers[candidate].state == DONE;
        }
        if (next < 0) {
            if (done < blockDim.x && !message[0]) snprintf(message, sizeof message, "threads wait for one another");
            return;
        }
        current = next, threadIdx = {next, 0, 0};
        swapcontext(&scheduler, &fibers[next].context);
        if (message[0]) return;
    }
}

template <class... Types, size_t... I>
static void launch(void (*kernel)(Types...), const Argument* a, std::index_sequence<I...>) {
    struct Call { void (*kernel)(Types...); std::tuple<Types...> values; };
    Call call = {kernel, {Get<Types>::of(a[I])...}};
    body = [](void* p) { std::apply(((Call*)p)->kernel, ((Call*)p)->values); };
    body_arguments = &call;
    std::vector<dim3> blocks;
    for (int y = 0; y < gridDim.y; y++)
        for (int x = 0; x < gridDim.x; x++) blocks.push_back({x, y, 0});
    for (size_t i = 1; i < blocks.size() && !in_order; i++) std::swap(blocks[i], blocks[rng() % (i + 1)]);
    for (auto block : blocks) {
        blockIdx = block;
        run_block();
        if (message[0]) return;
    }
}

// Seed 0 runs the threads in their order, each as far as it gets; any other seed, in an order drawn at random.
template <class... Types>
static const char* launch(void (*kernel)(Types...), int grid_x, int grid_y, int threads, int shared_bytes, int count,
                          const Argument* arguments, unsigned seed) {
    if (count != sizeof...(Types)) return "wrong number of arguments";
    message[0] = 0, current = 0, in_order = seed == 0, dynamic_bytes = shared_bytes;
    owners.clear(), owners.reserve(count), rng_state = 2654435769u * seed;
    gridDim = {grid_x, grid_y, 1}, blockDim = {threads, 1, 1};
    launch(kernel, arguments, std::index_sequence_for<Types...>());
    return message;
}

static float from_half(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    float f = exponent == 31 ? (fraction ? NAN : INFINITY)
                             : exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return h >> 15 ? -f : f;
}
static uint16_t to_half(float f) {
    uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    double a = std::fabs((double)f);
    if (std::isnan(f)) return 0x7fff;
    if (a == 0) return sign;
    if (a >= 65520) return sign | 0x7c00;
    int exponent;
    std::frexp(a, &exponent);
    exponent = exponent < -13 ? -13 : exponent;            // below, the numbers are evenly spaced
    double units = std::nearbyint(std::ldexp(a, 11 - exponent));  // to nearest, ties to even
    return sign | (uint16_t)(units + (exponent + 13) * 1024);
}
static float from_bfloat(uint16_t b) {
    uint32_t word = (uint32_t)b << 16;
    float f;
    memcpy(&f, &word, 4);
    return f;
}

}  // namespace emulation

#define __device__ static inline
#define __syncthreads() emulation::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) emulation::shuffle_xor(mask, value, lanes, __LINE__)
#define PTR(type) emulation::Global<type>
#define LATE(type) emulation::Late<type>
#define SHARED(type, name, count) static emulation::Shared<type> name(#name, count)
#define MEMORY(type) emulation::Shared<type>&
#define REUSED(name) name.forget()
#define DYNAMIC(type, name, start, count)                  \
    static emulation::Shared<type> name(#name, 0);         \
    name.place(start, count)
#define KERNEL static void
#define KERNEL_512 static void
#define KERNEL_2 static void
#define KERNEL_1 static void
#define LARGE_KERNEL static void
#define EXPORT(kernel)                                                                                      \
    extern "C" const char* run_##kernel(int x, int y, int threads, int shared_bytes, int count,             \
                                        const emulation::Argument* a, unsigned seed) {                      \
        return emulation::launch(kernel, x, y, threads, shared_bytes, count, a, seed);                      \
    }

static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a < b ? b : a; }
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
struct half16 { u16 bits; };
struct bfloat16 { u16 bits; };

template <class Wide, class T>
static Wide load(emulation::Global<const T> p, long long start) {
    emulation::access();
    if (start < 0 || start + (long long)sizeof(Wide) > p.count * (long long)sizeof(T))
        emulation::fail("%zu bytes at %lld of a buffer of %lld", sizeof(Wide), start, p.count * (long long)sizeof(T));
    if (((uintptr_t)p.base + start) % sizeof(Wide)) emulation::fail("%zu bytes at %lld: not aligned", sizeof(Wide), start);
    Wide value;
    memcpy(&value, (const char*)p.base + start, sizeof(Wide));
    return value;
}

template <class T>
static uint4 load_late(emulation::Late<T> p, long long start) {
    return emulation::Late<T>::check(), load<uint4>((emulation::Global<const T>)p, start);
}
template <class Wide, class T>
static void store(emulation::Global<T> p, long long start, const Wide& value) {
    if (((uintptr_t)p.base + start) % sizeof(Wide) || start % sizeof(T))
        emulation::fail("%zu bytes at %lld: not aligned", sizeof(Wide), start);
    for (int i = 0; i < (int)(sizeof(Wide) / sizeof(T)); i++) p[start / sizeof(T) + i] = ((const T*)&value)[i];
}

template <class T>
static uint4 load_often(emulation::Global<const T> p, int i) { return load<uint4>(p, 16LL * i); }
// Wide accesses to shared memory, from entry i on.
template <class Wide, class T>
static Wide take(emulation::Shared<T>& memory, long long i) {
    Wide value;
    for (long long j = memory.wide(i, sizeof(Wide)); j--;) ((T*)&value)[j] = memory.read(i + j);
    return value;
}
template <class Wide, class T>
static void put(emulation::Shared<T>& memory, long long i, const Wide& value) {
    for (long long j = memory.wide(i, sizeof(Wide)); j--;) memory.write(i + j, ((const T*)&value)[j]);
}

template <class T>
static void prefetch(emulation::Global<const T> p, int i) { p[i]; }
static void let_next_start() {}
static void wait_for_previous() { emulation::fibers[emulation::current].waited = true; }

static u32 __byte_perm(u32 low, u32 high, u32 selector) {  // byte i of the result is byte selector[i] of high:low
    unsigned long long both = (unsigned long long)high << 32 | low;
    u32 word = 0;
    for (int i = 0; i < 4; i++) word |= (u32)(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return word;
}
static u32 __float_as_uint(float f) { u32 w; memcpy(&w, &f, 4); return w; }
static float __uint_as_float(u32 w) { float f; memcpy(&f, &w, 4); return f; }
static float to_float(float x) { return x; }
static float to_float(half16 x) { return emulation::from_half(x.bits); }
static float to_float(bfloat16 x) { return emulation::from_bfloat(x.bits); }
static void from_float(float f, float& x) { x = f; }
static void from_float(float f, half16& x) { x.bits = emulation::to_half(f); }
static void from_float(float f, bfloat16& x) {
    u32 w;
    memcpy(&w, &f, 4);
    x.bits = f != f ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16;
}

template <class Real>
static u32 to_pair(float low, float high, Real) {
    Real a, b;
    from_float(low, a), from_float(high, b);
    return a.bits | (u32)b.bits << 16;
}
template <class Real>
static float half_of(u32 pair, int i) {
    Real number;
    number.bits = pair >> 16 * i;
    return to_float(number);
}
// mma.m16n8k16. Of A (16, 16) lane 4 g + t holds, in pairs, the rows g and g + 8 at k = 2 t, 2 t + 1, then at 8 more; of
// B (16, 8) column g at the same k; of C (16, 8) the rows g and g + 8 at the columns 2 t, 2 t + 1.
template <class Real = half16>
static void multiply_tile_at(int line, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Real = Real()) {
    u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    auto all = emulation::exchange(mine, 6, line);
    int lane = emulation::current % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            auto A = all[g * 4 + k % 8 / 2], B = all[(2 * t + i % 2) * 4 + k % 8 / 2];
            u32 a_pair = A[i / 2 + k / 8 * 2], b_pair = B[4 + k / 8];
            c[i] += half_of<Real>(a_pair, k % 2) * half_of<Real>(b_pair, k % 2);
        }
}
#define multiply_tile(...) multiply_tile_at(__LINE__, __VA_ARGS__)
