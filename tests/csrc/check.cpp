// The CPU kernel without Python, for the sanitizers and for emulators of other processors: every backend, over shapes
// that end anywhere in a vector, in buffers of exactly the size that is promised, against plain loops in double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "quip.h"

namespace {

std::mt19937 random_bits(0);

float normal() { return std::normal_distribution<float>()(random_bits); }

// An allocation of exactly n values, so that a sanitizer sees the first byte beyond.
template <class T>
struct Exactly {
    std::unique_ptr<T[]> data;
    explicit Exactly(int64_t n) : data(new T[n]()) {}
    operator T *() { return data.get(); }
};

struct Problem {
    quip_layer layer{};
    std::vector<int> code;  // (m, n)
    Exactly<uint8_t> codes;
    Exactly<float> scale{1}, one{1}, rescale, bias, LV, RV, LU, RU, RVt, RUt, SV, SU, SVt, SUt;
    Exactly<int64_t> v, u;

    static int64_t n_n(int64_t n) { return (n - 1) * (n - 1); }

    static int64_t width(int64_t n, int64_t bits) { return (n + 63) / 64 * 8 * bits; }

    // m = pm * qm and n = pn * qn. With `second`, both transforms have a stage for all but their first entry.
    Problem(int64_t pm, int64_t qm, int64_t pn, int64_t qn, int64_t bits, bool second = false)
        : code(pm * qm * pn * qn), codes(pm * qm * width(pn * qn, bits)), rescale(pn * qn), bias(pm * qm), LV(pn * pn),
          RV(qn * qn), LU(pm * pm), RU(qm * qm), RVt(qn * qn), RUt(qm * qm), SV(second * n_n(pn * qn)), SU(second * n_n(pm * qm)),
          SVt(second * n_n(pn * qn)), SUt(second * n_n(pm * qm)), v(pn * qn), u(pm * qm) {
        const int64_t m = pm * qm, n = pn * qn, w = width(n, bits), last_n = second ? n - 1 : 0, last_m = second ? m - 1 : 0;
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) {
                const int c = code[i * n + j] = static_cast<int>(random_bits() % (1 << bits));
                uint8_t *row = codes + i * w;
                if (bits == 4) row[j / 2] |= c << j % 2 * 4;
                if (bits != 4) row[j / 4] |= (c & 3) << j % 4 * 2;
                if (bits == 3) row[w / 3 * 2 + j / 8] |= (c >> 2) << j % 8;
            }
        scale[0] = 0.7f;
        for (int64_t j = 0; j < n; j++) rescale[j] = 1 + 0.1f * std::fabs(normal()), v[j] = (j * 7 + 3) % n;
        for (int64_t i = 0; i < m; i++) bias[i] = normal(), u[i] = m - 1 - i;
        if (n % 7 == 0) for (int64_t j = 0; j < n; j++) v[j] = n - 1 - j;
        for (auto [F, p] : {std::pair<float *, int64_t>{LV, pn}, {RV, qn}, {LU, pm}, {RU, qm}, {SV, last_n}, {SU, last_m}})
            for (int64_t i = 0; i < p * p; i++) F[i] = normal() / std::sqrt(static_cast<float>(p));
        for (auto [F, Ft, q] : {std::tuple<float *, float *, int64_t>{RV, RVt, qn}, {RU, RUt, qm}, {SV, SVt, last_n}, {SU, SUt, last_m}})
            for (int64_t i = 0; i < q * q; i++) Ft[i] = F[i % q * q + i / q];
        one[0] = 1;
        layer = {m, n, bits, codes, scale, rescale, bias, QUIP_FLOAT32,
                 {v, 1 + (second && n > 1), {{0, pn, qn, LV, RV, RVt}, {1, 1, n - 1, one, SV, SVt}}},
                 {u, 1 + (second && m > 1), {{0, pm, qm, LU, RU, RUt}, {1, 1, m - 1, one, SU, SUt}}}};
    }

    // L X R' of x (p, q), or with `back` L' X R
    static std::vector<double> kronecker(const std::vector<double> &x, int64_t p, int64_t q, const float *L, const float *R,
                                         bool back) {
        std::vector<double> y(p * q);
        for (int64_t i = 0; i < p; i++)
            for (int64_t k = 0; k < p; k++)
                for (int64_t j = 0; j < q; j++)
                    for (int64_t l = 0; l < q; l++)
                        y[i * q + j] += (back ? L[k * p + i] : L[i * p + k]) * x[k * q + l] *
                                        static_cast<double>(back ? R[l * q + j] : R[j * q + l]);
        return y;
    }

    static void apply(const quip_stage &s, std::vector<double> &z, bool back) {
        const auto first = z.begin() + s.offset;
        const auto y = kronecker({first, first + s.p * s.q}, s.p, s.q, s.L, s.R, back);
        std::copy(y.begin(), y.end(), first);
    }

    std::vector<double> product(const std::vector<double> &z) const {
        std::vector<double> y(layer.m);
        const double top = (1 << layer.bits) - 1;
        for (int64_t i = 0; i < layer.m; i++)
            for (int64_t j = 0; j < layer.n; j++)
                y[i] += *layer.scale * (2 * code[i * layer.n + j] - top) / top * z[j];
        return y;
    }

    // Take another layer's V, and no D.
    void share(const Problem &other) {
        layer.V = other.layer.V;
        layer.rescale = nullptr;
    }

    template <class T>
    std::vector<double> run(const T *x) const {
        std::vector<double> z(layer.n), y(layer.m);
        for (int64_t j = 0; j < layer.n; j++) z[j] = static_cast<double>(x[layer.V.perm[j]]) / (layer.rescale ? layer.rescale[layer.V.perm[j]] : 1);
        for (int64_t i = 0; i < layer.V.stages; i++) apply(layer.V.stage[i], z, false);
        z = product(z);
        for (int64_t i = layer.U.stages; i-- > 0;) apply(layer.U.stage[i], z, true);
        for (int64_t i = 0; i < layer.m; i++) y[layer.U.perm[i]] = z[i] + static_cast<const float *>(layer.bias)[layer.U.perm[i]];
        return y;
    }
};

int failures = 0;

void compare(const char *what, const std::string &backend, const Problem &p, const float *y, const std::vector<double> &exact,
             double tolerance = 1e-3) {
    double error = 0, norm = 1e-30;
    for (size_t i = 0; i < exact.size(); i++) error += std::pow(y[i] - exact[i], 2), norm += exact[i] * exact[i];
    if (std::sqrt(error / norm) < tolerance) return;  // the outputs of a few rows may be small by chance
    std::printf("%s on %s, %d x %d, %d bits: relative error %g\n", what, backend.c_str(), static_cast<int>(p.layer.m),
                static_cast<int>(p.layer.n), static_cast<int>(p.layer.bits), std::sqrt(error / norm));
    failures++;
}

void check(const std::string &backend, Problem &p, int64_t batch, int64_t threads) {
    const int64_t m = p.layer.m, n = p.layer.n;
    Exactly<float> x(batch * n), y(batch * m), z(batch * m), W(m * n);
    for (int64_t i = 0; i < batch * n; i++) x[i] = normal();
    if (quip_linear(&p.layer, x, y, batch, QUIP_FLOAT32, threads) || quip_multiply(&p.layer, x, z, batch, threads)) failures++;
    if (quip_dense(&p.layer, W, QUIP_FLOAT32, threads)) failures++;
    for (int64_t t = 0; t < batch; t++) {
        compare("layer", backend, p, y + t * m, p.run(x + t * n), p.layer.V.stages > 1 ? 5e-3 : 1e-3);
        compare("product", backend, p, z + t * m, p.product({x + t * n, x + (t + 1) * n}));
        for (int64_t i = 0; i < m; i++) {
            double sum = static_cast<const float *>(p.layer.bias)[i];
            for (int64_t j = 0; j < n; j++) sum += static_cast<double>(W[i * n + j]) * x[t * n + j];
            y[t * m + i] = static_cast<float>(sum);
        }
        compare("dense matrix", backend, p, y + t * m, p.run(x + t * n));
    }
}

float number(uint16_t bfloat16) {
    const uint32_t word = static_cast<uint32_t>(bfloat16) << 16;
    float v;
    std::memcpy(&v, &word, 4);
    return v;
}

// In bfloat16, in which x is exact: a few numbers in 16 bits after the other are off by a few per thousand each.
void check_prompt(const std::string &backend, Problem &p, int64_t batch, int64_t threads) {
    const int64_t m = p.layer.m, n = p.layer.n;
    Exactly<float> x(batch * n), out(m);
    Exactly<uint16_t> half(batch * n), y(batch * m), W(m * n);
    for (int64_t i = 0; i < batch * n; i++) {
        const float v = normal();
        uint32_t word;
        std::memcpy(&word, &v, 4);
        half[i] = word >> 16, word &= 0xffff0000u;
        std::memcpy(x + i, &word, 4);
    }
    const int64_t bad = batch > 1 ? batch / 2 : -1;  // a vector that must not spoil others
    const double tolerance = p.layer.V.stages > 1 ? 0.3 : 0.1;
    if (batch > 1) half[bad * n] = 0x7FC0;
    if (quip_prompt(&p.layer, half, y, batch, threads) || quip_dense(&p.layer, W, QUIP_BFLOAT16, threads)) failures++;
    for (int64_t t = 0; t < batch; t += batch > 100 ? 97 : 1) {
        for (int64_t i = 0; i < m; i++) out[i] = number(y[t * m + i]);
        if (t != bad) compare("prompt", backend, p, out, p.run(x + t * n), tolerance);
        for (int64_t i = 0; i < m; i++) {
            double sum = static_cast<const float *>(p.layer.bias)[i];
            for (int64_t j = 0; j < n; j++) sum += static_cast<double>(number(W[i * n + j])) * x[t * n + j];
            out[i] = static_cast<float>(sum);
        }
        compare("dense matrix in bfloat16", backend, p, out, p.run(x + t * n), tolerance);
    }
}

std::vector<double> gate(std::vector<double> g, const std::vector<double> &u) {
    for (size_t i = 0; i < g.size(); i++) g[i] *= u[i] / (1 + std::exp(-g[i]));
    return g;
}

void check_gated(const std::string &backend, int64_t bits, int64_t batch, int64_t threads) {
    Problem g(3, 5, 6, 7, bits), u(3, 5, 6, 7, bits), d(4, 3, 3, 5, bits);
    g.share(g);
    u.share(g);
    const int64_t n = g.layer.n, m = d.layer.m;
    Exactly<float> x(batch * n), y(batch * m), a(batch * 15), b(batch * 15);
    for (int64_t i = 0; i < batch * n; i++) x[i] = normal();
    const quip_layer *const both[] = {&g.layer, &u.layer};
    void *const out[] = {a, b};
    if (quip_gated(&g.layer, &u.layer, &d.layer, x, y, batch, QUIP_FLOAT32, threads)) failures++;
    if (quip_linears(both, 2, x, out, batch, QUIP_FLOAT32, threads)) failures++;
    for (int64_t t = 0; t < batch; t++) {
        compare("first of two", backend, g, a + t * 15, g.run(x + t * n));
        compare("second of two", backend, u, b + t * 15, u.run(x + t * n));
        compare("gated", backend, d, y + t * m, d.run(gate(g.run(x + t * n), u.run(x + t * n)).data()));
    }
}

std::vector<double> norm(const std::vector<double> &x, const float *weight, double eps) {
    double sum = 0;
    std::vector<double> y(x.size());
    for (double v : x) sum += v * v;
    for (size_t i = 0; i < x.size(); i++) y[i] = x[i] * weight[i] / std::sqrt(sum / static_cast<double>(x.size()) + eps);
    return y;
}

// A block: two queries for each of `shared` keys of 16 numbers. The large one is work for several threads.
void check_block(const std::string &backend, int64_t bits, int64_t keys, int64_t threads, bool large) {
    const int64_t size = 16, a = large ? 24 : 6, b = large ? 24 : 7, c = large ? 32 : 3, e = large ? 32 : 5;
    const int64_t n = a * b, shared = large ? 8 : 1, h = 2 * shared;
    Problem q(h, size, a, b, bits), k(shared, size, a, b, bits), v(shared, size, a, b, bits), o(a, b, h, size, bits);
    Problem g(c, e, a, b, bits), u(c, e, a, b, bits), d(a, b, c, e, bits);
    for (Problem *p : {&q, &k, &v}) p->share(q);
    for (Problem *p : {&g, &u}) p->share(g);
    Exactly<float> x(n), y(n), first(n), second(n), cos(size), sin(size), Q(h * size);
    Exactly<float> K(shared * keys * size), V(shared * keys * size), newK(shared * size), newV(shared * size);
    for (float *w : {static_cast<float *>(x), static_cast<float *>(first), static_cast<float *>(second)})
        for (int64_t i = 0; i < n; i++) w[i] = normal();
    for (int64_t i = 0; i < shared * keys * size; i++) K[i] = normal(), V[i] = normal();
    for (int64_t i = 0; i < size; i++) cos[i] = std::cos(i % 8 + 0.5f), sin[i] = std::sin(i % 8 + 0.5f);
    const quip_block block{&q.layer, &k.layer, &v.layer, &o.layer, &g.layer, &u.layer, &d.layer, first, second,
                           1e-5, 1e-6, 0.25, h, shared, size, QUIP_FLOAT32};
    if (quip_block_in(&block, x, cos, sin, Q, newK, newV, threads)) failures++;
    for (int64_t i = 0; i < shared * size; i++) {
        const int64_t last = (i / size * keys + keys - 1) * size + i % size;
        K[last] = newK[i], V[last] = newV[i];
    }
    if (quip_block_out(&block, x, Q, K, V, keys, keys * size, size, y, threads)) failures++;
    Exactly<float> again(n);
    quip_rms_norm(x, first, again, 1, n, 1e-5, QUIP_FLOAT32);

    std::vector<double> y_(x + 0, x + n), z = norm(y_, first, 1e-5), heads(h * size);
    compare("norm", backend, o, again, z);
    compare("values", backend, v, newV, v.run(z.data()));
    for (auto [p, out, count] : {std::tuple<Problem *, float *, int64_t>{&q, Q, h}, {&k, newK, shared}}) {
        const std::vector<double> straight = p->run(z.data());
        std::vector<double> turned(straight.size());
        for (int64_t i = 0; i < count * size; i++) {
            const double other = i % size < 8 ? -straight[i + 8] : straight[i - 8];
            turned[i] = straight[i] * cos[i % size] + other * sin[i % size];
        }
        compare("turned", backend, *p, out, turned);
    }
    for (int64_t head = 0; head < h; head++) {
        const float *ks = K + head / 2 * keys * size, *vs = V + head / 2 * keys * size;
        std::vector<double> scores(keys);
        for (int64_t t = 0; t < keys; t++)
            for (int64_t i = 0; i < size; i++) scores[t] += 0.25 * Q[head * size + i] * ks[t * size + i];
        const double most = *std::max_element(scores.begin(), scores.end());
        double all = 0;
        for (int64_t t = 0; t < keys; t++) {
            const double part = std::exp(scores[t] - most);
            all += part;
            for (int64_t i = 0; i < size; i++) heads[head * size + i] += part * vs[t * size + i];
        }
        for (int64_t i = 0; i < size; i++) heads[head * size + i] /= all;
    }
    const std::vector<double> attended = o.run(heads.data());
    for (int64_t i = 0; i < n; i++) y_[i] += attended[i];
    z = norm(y_, second, 1e-6);
    const std::vector<double> made = d.run(gate(g.run(z.data()), u.run(z.data())).data());
    for (int64_t i = 0; i < n; i++) y_[i] += made[i];
    compare("block", backend, d, y, y_);
}

}  // namespace

int main() {
    const int64_t shapes[][4] = {{1, 1, 1, 1}, {1, 3, 1, 2}, {2, 3, 3, 5}, {5, 8, 7, 9}, {4, 4, 8, 8}, {6, 7, 10, 13},
                                 {3, 11, 16, 20}, {5, 5, 12, 43}, {2, 2, 19, 27}, {17, 19, 3, 3}};
    std::istringstream names(quip_backends());
    int checks = 0;
    for (std::string name; names >> name;) {
        if (quip_use(name.c_str()) || name != quip_backend()) failures++;
        for (const auto &s : shapes)
            for (int64_t bits = 2; bits <= 4; bits++)
                for (int64_t batch : {1, 2, 5, 21, 66, 600}) {
                    if (batch > 5 && s[0] != (batch > 100 ? 2 : 4)) continue;
                    Problem p(s[0], s[1], s[2], s[3], bits, batch == 2 || batch == 21);
                    check(name, p, batch, 1 + batch % 2);
                    check_prompt(name, p, batch, 1 + batch % 2);
                    checks++;
                }
        for (int64_t bits = 2; bits <= 4; bits++)
            for (int64_t count : {1, 2, 7, 35}) {
                check_gated(name, bits, count, 1 + count % 2);
                check_block(name, bits, count, 1 + count % 2, false);
                checks += 2;
            }
        for (int64_t threads : {1, 2, 3}) check_block(name, 2, 19, threads, true);
        std::printf("%s ", name.c_str());
    }
    if (quip_use("none") != 1) failures++;
    std::printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
