/* The CUDA kernels without torch or Python: every case in a process of its own with a time limit, checked against plain
 * loops on the host. For the first minute on a GPU, and under compute-sanitizer:
 *
 *     nvcc -std=c++17 -O3 -Icsrc/cuda/device -Icsrc -gencode arch=compute_90a,code=sm_90a [-DLATEMAX_WATCHDOG] \
 *         -x cu csrc/cuda/*.cu tests/native/cuda_driver.cpp -o cuda_driver
 *     ./cuda_driver [capability] [seconds a case]        all cases; capability 0 (the device's), 80 or 90
 *     compute-sanitizer ./cuda_driver 90 case 17         one case, in this process
 *
 * With g++ and tests/cuda_emulator instead of csrc/cuda/device it runs without a GPU, which a test does.
 */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/maxsim_cuda.h"
#include "runtime.h"

namespace {

struct Case {
    int n_q, n_c, l_q, l_d, dim;
    bool own, ragged, argmax, masked, normalize, backward = false, codes = false;
};

std::vector<Case> cases() {
    std::vector<Case> all;
    // rows of a query block: 64, 128, 256 and chunks of a long query
    const int queries[][2] = {{1, 20}, {3, 40}, {1, 100}, {9, 32}, {2, 200}};
    for (int dim : {64, 96, 128, 192, 320, 512, 704, 768})
        for (const auto &[n_q, l_q] : queries)
            for (int form = 0; form < 6; ++form)
                all.push_back({n_q, 3, l_q, form % 2 ? 300 : 130, dim, form == 1 || form == 4, form == 2 || form == 5, form != 0,
                               form == 3 || form == 5, form > 3});
    // the gradient: each number of elements in a lane, documents in several parts and batches, every form of documents
    for (int dim : {64, 128, 256, 320, 704, 1024})
        for (const auto &[n_q, l_q] : {std::pair{3, 40}, {1, 200}, {400, 100}})
            for (int form = 0; form < 4; ++form)
                if (n_q < 400 || (dim == 128 && form != 1))
                    all.push_back({n_q, 3, l_q, form % 2 ? 700 : 130, dim, form == 1 || form == 3, form > 1, true, dim == 256,
                                   form > 1, true});
    // 8-bit codes: one, one and a half and two slabs in registers, more with half a step in the last, and a long ring
    for (int dim : {128, 192, 256, 272, 1536})
        for (const auto &[n_q, l_q] : {std::pair{3, 40}, {9, 32}, {2, 200}})
            for (int form = 2; form < 6; ++form)
                all.push_back({n_q, 3, l_q, form % 2 ? 300 : 130, dim, form == 4, form == 2 || form == 5, form != 2,
                               form == 3 || form == 5, form > 3, false, true});
    return all;
}

#ifdef __CUDACC__
template <class T>
T *to_device(const std::vector<T> &x) {
    T *out = nullptr;
    latemax::check(cudaMalloc(&out, x.size() * sizeof(T) + 16), "cudaMalloc");
    latemax::check(cudaMemcpy(out, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    return out;
}
template <class T>
void to_host(std::vector<T> &x, const T *from) {
    latemax::check(cudaMemcpy(x.data(), from, x.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
}
#else
template <class T>
T *to_device(const std::vector<T> &x) {
    T *out = static_cast<T *>(aligned_alloc(16, (x.size() * sizeof(T) + 31) / 16 * 16));
    memcpy(out, x.data(), x.size() * sizeof(T));
    return out;
}
template <class T>
void to_host(std::vector<T> &x, const T *from) {
    memcpy(x.data(), from, x.size() * sizeof(T));
}
#endif

float widen(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* bfloat16 tokens; the same seed gives the same values everywhere. */
std::vector<uint16_t> tokens(size_t count, std::mt19937 &random) {
    std::vector<uint16_t> out(count);
    for (uint16_t &x : out) {
        const float value = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 500;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        x = static_cast<uint16_t>(bits >> 16);
    }
    return out;
}

double inverse_norm(const double *token, int dim) {
    double sum = 0;
    for (int k = 0; k < dim; ++k) sum += token[k] * token[k];
    return 1 / std::fmax(std::sqrt(sum), 1e-12);
}
double inverse_norm(const uint16_t *token, int dim) {
    std::vector<double> values(token, token + dim);
    for (int k = 0; k < dim; ++k) values[k] = widen(token[k]);
    return inverse_norm(values.data(), dim);
}

/* One side of a forward pass on the device, and the numbers that it means. */
struct Numbers {
    const void *tokens;
    const float *scales = nullptr;
    std::vector<double> values;

    Numbers(int64_t rows, int dim, bool codes, std::mt19937 &random) : values(rows * dim) {
        if (!codes) {
            const auto halves = ::tokens(values.size(), random);
            for (size_t i = 0; i < values.size(); ++i) values[i] = widen(halves[i]);
            tokens = to_device(halves);
            return;
        }
        std::vector<int8_t> integers(values.size());
        std::vector<float> factors(rows);
        for (float &x : factors) x = static_cast<float>(random() % 1000 + 1) / 5000;
        for (size_t i = 0; i < values.size(); ++i) {
            integers[i] = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
            values[i] = static_cast<double>(factors[i / dim]) * integers[i];
        }
        tokens = to_device(integers), scales = to_device(factors);
    }
};

/* The largest relative error of a score; a wrong argmax or a score that was not written is an error of 1. */
double run(const Case &c, int capability) {
    std::mt19937 random(1);
    const int documents = c.own ? c.n_q * c.n_c : c.n_c;
    std::vector<int64_t> offsets{0};
    for (int i = 0; i < documents; ++i) offsets.push_back(offsets.back() + (c.ragged ? (i % 3 ? c.l_d - 37 * (i % 3) : c.l_d) : c.l_d));
    const int64_t rows = offsets.back();
    const Numbers q(static_cast<int64_t>(c.n_q) * c.l_q, c.dim, c.codes, random), d(rows, c.dim, c.codes, random);
    std::vector<uint8_t> keep(rows, 1);
    for (int64_t i = 0; c.masked && i < rows; ++i) keep[i] = random() % 10 != 0;

    maxsim_args a{};
    a.n_q = c.n_q, a.n_c = c.n_c, a.dim = c.dim, a.own = c.own, a.normalize = c.normalize, a.empty_score = -1;
    a.q.tokens = q.tokens, a.q.scale = q.scales, a.q.dtype = a.d.dtype = c.codes ? MAXSIM_I8 : MAXSIM_BF16;
    a.q.n = c.n_q, a.q.l = c.l_q, a.q.total = c.n_q * c.l_q;
    a.q.stride_n = c.l_q * c.dim, a.q.stride_l = c.dim, a.q.stride_k = 1;
    a.d.tokens = d.tokens, a.d.scale = d.scales, a.d.n = c.n_c, a.d.l = c.l_d, a.d.total = rows;
    a.d.stride_q = c.own ? static_cast<int64_t>(c.n_c) * c.l_d * c.dim : 0;
    a.d.stride_n = c.l_d * c.dim, a.d.stride_l = c.dim, a.d.stride_k = 1;
    if (c.ragged) a.d.offsets = to_device(offsets);
    if (c.masked) {
        a.d.mask = to_device(keep);
        a.d.mask_stride_q = c.own ? static_cast<int64_t>(c.n_c) * c.l_d : 0, a.d.mask_stride_n = c.l_d, a.d.mask_stride_l = 1;
    }
    std::vector<float> scores(c.n_q * c.n_c, NAN);
    std::vector<int32_t> argmax(static_cast<size_t>(c.n_q) * c.n_c * c.l_q, -9);
    a.scores = to_device(scores);
    if (c.argmax) a.argmax = to_device(argmax);
    const std::vector<char> scratch(latemax::scratch_bytes(a, 0, capability));
    latemax::forward(a, to_device(scratch), 0, nullptr, capability);
    to_host(scores, a.scores);
    if (c.argmax) to_host(argmax, a.argmax);

    double worst = 0;
    for (int i = 0; i < c.n_q; ++i)
        for (int n = 0; n < c.n_c; ++n) {
            const int document = c.own ? i * c.n_c + n : n;
            double sum = 0;
            for (int t = 0; t < c.l_q; ++t) {
                const double *x = &q.values[(static_cast<size_t>(i) * c.l_q + t) * c.dim];
                double best = -INFINITY;
                std::vector<double> similarities;
                for (int64_t row = offsets[document]; row < offsets[document + 1]; ++row) {
                    double dot = 0;
                    const double *y = &d.values[row * c.dim];
                    for (int k = 0; k < c.dim; ++k) dot += x[k] * y[k];
                    if (c.normalize) dot *= inverse_norm(x, c.dim) * inverse_norm(y, c.dim);
                    similarities.push_back(keep[row] ? dot : -INFINITY);
                    best = std::fmax(best, similarities.back());
                }
                sum += best;
                if (!c.argmax) continue;
                // by value: two similarities may differ by less than a float tells
                const int32_t at = argmax[(static_cast<size_t>(i) * c.n_c + n) * c.l_q + t];
                if (at < 0 || at >= static_cast<int32_t>(similarities.size()) ||
                    !(similarities[at] >= best - 1e-4 * std::fabs(best) - 1e-5))
                    return 1;
            }
            const double error = std::fabs(scores[i * c.n_c + n] - sum) / std::fmax(std::fabs(sum), 1);
            if (!(error <= worst)) worst = std::isnan(error) ? 1 : error;
        }
    return worst;
}

uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The error of a gradient of one side over its largest element: sums of weight · row, through the norm. */
double compare(const std::vector<double> &units, const std::vector<uint16_t> &x, const std::vector<uint16_t> &ours, int dim,
               bool normalize) {
    double worst = 0, largest = 1e-9;
    for (size_t row = 0; row < x.size() / dim; ++row) {
        const double inverse = normalize ? inverse_norm(&x[row * dim], dim) : 1;
        double along = 0;
        for (int k = 0; normalize && k < dim; ++k) along += units[row * dim + k] * widen(x[row * dim + k]) * inverse;
        for (int k = 0; k < dim; ++k) {
            const double truth = (units[row * dim + k] - along * widen(x[row * dim + k]) * inverse) * inverse;
            largest = std::fmax(largest, std::fabs(truth));
            const double error = std::fabs(truth - widen(ours[row * dim + k]));
            worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
        }
    }
    return worst / largest;
}

/* The backward from a random argmax. Ragged with own documents: candidates, which name documents several times or not at all.
 * The largest error over the largest gradient; gradients that differ when they are computed again are an error of 1. */
double run_backward(const Case &c) {
    std::mt19937 random(1);
    const bool named = c.own && c.ragged, own = c.own && !c.ragged;
    const int documents = own ? c.n_q * c.n_c : c.n_c;
    std::vector<int64_t> offsets{0};
    for (int i = 0; i < documents; ++i) offsets.push_back(offsets.back() + (c.ragged ? c.l_d - 60 * (i % 3) : c.l_d));
    const int64_t rows = offsets.back(), q_rows = static_cast<int64_t>(c.n_q) * c.l_q;
    const auto q = tokens(q_rows * c.dim, random), d = tokens(rows * c.dim, random);
    std::vector<int64_t> names(c.n_q * c.n_c), pairs, starts;
    for (int64_t &x : names) x = static_cast<int64_t>(random() % (c.n_c + 1)) - 1;
    for (int i = 0; i <= c.n_c; ++i) {
        starts.push_back(pairs.size());
        for (size_t pair = 0; pair < names.size(); ++pair)
            if (names[pair] == i) pairs.push_back(pair);
    }
    std::vector<float> g(c.n_q * c.n_c);
    for (float &x : g) x = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 500;
    std::vector<int32_t> argmax(q_rows * c.n_c, -1);
    std::vector<double> q_units(q.size()), d_units(d.size());
    for (int i = 0; i < c.n_q; ++i)
        for (int n = 0; n < c.n_c; ++n) {
            const int64_t document = named ? names[i * c.n_c + n] : own ? i * c.n_c + n : n;
            for (int t = 0; document >= 0 && t < c.l_q; ++t) {
                if (c.masked && random() % 4 == 0) continue;
                const int64_t length = offsets[document + 1] - offsets[document];
                // half of them on one token
                const int64_t at = random() % 2 ? length / 2 : random() % length, x = i * c.l_q + t, y = offsets[document] + at;
                argmax[(static_cast<size_t>(i) * c.n_c + n) * c.l_q + t] = static_cast<int32_t>(at);
                const double weight = g[i * c.n_c + n], q_scale = c.normalize ? inverse_norm(&q[x * c.dim], c.dim) : 1,
                             d_scale = c.normalize ? inverse_norm(&d[y * c.dim], c.dim) : 1;
                for (int k = 0; k < c.dim; ++k) {
                    q_units[x * c.dim + k] += weight * d_scale * widen(d[y * c.dim + k]);
                    d_units[y * c.dim + k] += weight * q_scale * widen(q[x * c.dim + k]);
                }
            }
        }

    maxsim_args a{};
    a.n_q = c.n_q, a.n_c = c.n_c, a.dim = c.dim, a.own = c.own, a.normalize = c.normalize;
    a.q.tokens = to_device(q), a.q.dtype = a.d.dtype = MAXSIM_BF16;
    a.q.n = c.n_q, a.q.l = c.l_q, a.q.total = q_rows, a.q.stride_n = c.l_q * c.dim, a.q.stride_l = c.dim, a.q.stride_k = 1;
    a.d.tokens = to_device(d), a.d.n = c.n_c, a.d.l = c.ragged ? rows : c.l_d, a.d.total = rows;
    a.d.stride_q = own ? static_cast<int64_t>(c.n_c) * c.l_d * c.dim : 0;
    a.d.stride_n = c.l_d * c.dim, a.d.stride_l = c.dim, a.d.stride_k = 1;
    if (c.ragged) a.d.offsets = to_device(offsets);
    if (named) a.candidates = to_device(names);
    a.argmax = to_device(argmax);
    latemax::Gradient out{to_device(g), c.n_c, 1};
    if (named) out.pairs = to_device(pairs), out.pair_starts = to_device(starts);
    out.parts = to_device(std::vector<float>(latemax::splits(q_rows, c.n_c, 0) * q.size()));
    std::vector<uint16_t> found[2][2];
    for (auto &[grad_q, grad_d] : found) {
        grad_q.assign(q.size(), narrow(NAN)), grad_d.assign(d.size(), narrow(NAN));
        auto *on_q = to_device(grad_q), *on_d = to_device(grad_d);
        out.q = on_q, out.d = on_d;
        latemax::backward(a, out, 0, nullptr);
        to_host(grad_q, on_q), to_host(grad_d, on_d);
    }
    if (found[0][0] != found[1][0] || found[0][1] != found[1][1]) return 1;
    return std::fmax(compare(q_units, q, found[0][0], c.dim, c.normalize),
                     compare(d_units, d, found[0][1], c.dim, c.normalize));
}

std::string name(const Case &c) {
    char text[200];
    snprintf(text, sizeof text, "%sdim %d, %d x %d query tokens, %d documents of %d%s%s%s%s%s", c.backward ? "gradient, " : c.codes ? "codes, " : "", c.dim, c.n_q, c.l_q, c.n_c, c.l_d,
             c.own ? ", own" : "", c.ragged ? ", ragged" : "", c.argmax ? ", argmax" : "", c.masked ? ", masked" : "",
             c.normalize ? ", normalize" : "");
    return text;
}

int one(int index, int capability) {
    try {
        const Case c = cases()[index];
        const double error = c.backward ? run_backward(c) : run(c, capability);
        std::printf("error %.1e ", error);
        std::fflush(stdout);
        // a gradient is rounded to bfloat16 once, by half of its last digit
        return error < (c.backward ? 1.0 / 256 : 1e-5) ? 0 : 1;
    } catch (const std::exception &failed) {
        std::printf("%s ", failed.what());
        std::fflush(stdout);
        return 1;
    }
}

}  // namespace

int main(int argc, char **argv) {
    const int capability = argc > 1 ? atoi(argv[1]) : 0;
    if (argc > 3 && !strcmp(argv[2], "case")) return one(atoi(argv[3]), capability);
    const int limit = argc > 2 ? atoi(argv[2]) : 10, count = static_cast<int>(cases().size());
    int failed = 0;
    for (int i = 0; i < count; ++i) {
        // this process never opens the device, so that a fault in one case leaves the others alone
        std::printf("%d %s: ", i, name(cases()[i]).c_str());
        std::fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            alarm(limit);
            const std::string number = std::to_string(i);
            execl("/proc/self/exe", argv[0], argc > 1 ? argv[1] : "0", "case", number.c_str(), nullptr);
            _exit(127);
        }
        int status = 0;
        waitpid(child, &status, 0);
        const bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 0;
        failed += !ok;
        std::printf("%s\n", ok ? "ok" : WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM ? "TOO LONG" : "FAILED");
        std::fflush(stdout);
    }
    std::printf("%d of %d cases failed\n", failed, count);
    return failed != 0;
}
