/* Runs csrc/cpu without Python: every level, form and dtype on one thread and on three, against plain loops in double.
 * For sanitizers (tests/test_sanitizers.py) and for processors that have no torch. Every buffer has exactly its size.
 */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/maxsim_cpu.h"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity(), NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
std::mt19937 random_bits(0);

enum Values { ORDINARY, DENORMAL, SPECIAL };

struct Tensor {
    maxsim_dtype dtype;
    std::vector<char> bytes;
    std::vector<uint8_t> mask; /* empty: none */

    void put(int64_t i, float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (dtype == MAXSIM_F32) std::memcpy(bytes.data() + 4 * i, &x, 4);
        uint16_t half = static_cast<uint16_t>(bits >> 16);
        if (dtype == MAXSIM_F16) {
            const float size = std::fabs(x);
            half = std::isnan(x) ? 0x7e00 : std::isinf(x) ? 0x7c00 : 0;
            if (size > 0x1p-14f && size < 60000.0f) {
                int exponent;
                const float fraction = std::frexp(size, &exponent);
                half = static_cast<uint16_t>((exponent + 14) << 10 | (static_cast<int>(fraction * 2048) & 1023));
            } else if (size <= 0x1p-14f) {
                half = static_cast<uint16_t>(size * 0x1p24f);
            }
            if (x < 0) half |= 0x8000;
        }
        if (dtype != MAXSIM_F32) std::memcpy(bytes.data() + 2 * i, &half, 2);
    }
    double get(int64_t i) const {
        if (dtype == MAXSIM_F32) {
            float x;
            std::memcpy(&x, bytes.data() + 4 * i, 4);
            return x;
        }
        uint16_t half;
        std::memcpy(&half, bytes.data() + 2 * i, 2);
        if (dtype == MAXSIM_BF16) {
            const uint32_t bits = static_cast<uint32_t>(half) << 16;
            float x;
            std::memcpy(&x, &bits, 4);
            return x;
        }
        const int exponent = half >> 10 & 31, fraction = half & 1023;
        const double size = exponent == 31 ? (fraction ? NOT_A_NUMBER : INF)
                            : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                           : std::ldexp(fraction, -24);
        return half & 0x8000 ? -size : size;
    }
};

Tensor tokens(maxsim_dtype dtype, int64_t n, int64_t dim, bool masked, Values values) {
    Tensor t{dtype, std::vector<char>(n * dim * (dtype == MAXSIM_F32 ? 4 : 2)), {}};
    std::normal_distribution<float> normal;
    const float unit = values != DENORMAL ? 1.0f : dtype == MAXSIM_F16 ? 1e-6f : 1e-39f;
    for (int64_t i = 0; i < n * dim; ++i) t.put(i, normal(random_bits) * unit);
    for (int64_t r = 0; values == SPECIAL && r < n; ++r)
        if (random_bits() % 40 == 0) t.put(r * dim + dim / 2, r % 3 ? (r % 3 == 1 ? INF : -INF) : NOT_A_NUMBER);
    if (masked) t.mask.resize(n);
    for (int64_t r = 0; r < static_cast<int64_t>(t.mask.size()); ++r) {
        t.mask[r] = random_bits() % 3 != 0;
        for (int64_t k = 0; !t.mask[r] && k < dim; ++k) t.put(r * dim + k, NOT_A_NUMBER);
    }
    return t;
}

struct Case {
    maxsim_args args{};
    Tensor q, d;
    std::vector<int64_t> q_offsets, d_offsets, candidates;
    std::vector<float> weights;
};

int64_t offset(const std::vector<int64_t> &cu, int64_t n, int64_t length) { return cu.empty() ? n * length : cu[n]; }

/* Adds to `wrong` each argmax that is not one, within the tolerance of a similarity. */
double pair_score(const Case &c, int64_t a, int64_t slot, const int32_t *argmax, double tolerance, int &wrong) {
    const maxsim_args &args = c.args;
    int64_t document = args.candidates ? args.candidates[a * args.n_c + slot] : args.own ? a * args.n_c + slot : slot;
    const int64_t first = document < 0 ? 0 : offset(c.d_offsets, document, args.d.l);
    const int64_t end = document < 0 ? 0 : offset(c.d_offsets, document + 1, args.d.l);
    const int64_t dim = args.dim;
    auto norm = [&](const Tensor &t, int64_t row) {
        if (!args.normalize) return 1.0;
        double squares = 0;
        for (int64_t k = 0; k < dim; ++k) squares += t.get(row * dim + k) * t.get(row * dim + k);
        return std::sqrt(squares) < 1e-12 ? 1e-12 : std::sqrt(squares);
    };
    const int64_t first_token = offset(c.q_offsets, a, args.q.l);
    const int32_t *argmax_row = argmax + (c.q_offsets.empty() ? (a * args.n_c + slot) * args.q.l : slot * args.q.total + first_token);
    double total = 0;
    int valid_tokens = 0;
    bool some_query = false, some_document = false;
    for (int64_t i = offset(c.q_offsets, a, args.q.l); i < offset(c.q_offsets, a + 1, args.q.l); ++i) {
        const int32_t at = argmax_row[i - first_token];
        if (!c.q.mask.empty() && !c.q.mask[i]) {
            wrong += at != -1;
            continue;
        }
        some_query = true;
        double best = -INF, at_similarity = -INF;
        int64_t first_nan = -1;
        bool valid = false;
        for (int64_t j = first; j < end; ++j) {
            if (!c.d.mask.empty() && !c.d.mask[j]) continue;
            some_document = true;
            double s = 0;
            for (int64_t k = 0; k < dim; ++k) s += c.q.get(i * dim + k) * c.d.get(j * dim + k);
            s /= norm(c.q, i) * norm(c.d, j);
            if (std::isnan(s) && first_nan < 0) first_nan = j - first;
            if (j - first == at) at_similarity = s, valid = true;
            best = std::isnan(best) || std::isnan(s) ? NOT_A_NUMBER : std::fmax(best, s);
        }
        if (first == end || !some_document)
            wrong += at != -1;
        else if (first_nan >= 0)
            wrong += at != first_nan;
        else
            wrong += !valid || !(at_similarity == best || at_similarity >= best - tolerance - 1e-5 * std::fabs(best));
        total += c.weights.empty() ? best : best * c.weights[i];
        ++valid_tokens;
    }
    if (args.mean && valid_tokens) total /= valid_tokens;
    return !some_query ? 0 : some_document ? total : args.empty_score;
}

struct Results {
    std::vector<float> scores;
    std::vector<int32_t> argmax;
    std::vector<char> grad_q, grad_d;
    std::vector<float> grad_weights;
};

Results forward(maxsim_args &args, const latemax::Level &level, int threads) {
    Results r{std::vector<float>(args.n_q * args.n_c, 7), std::vector<int32_t>(args.q.total * args.n_c, -99), {}, {}, {}};
    args.scores = r.scores.data(), args.argmax = r.argmax.data();
    latemax::forward(args, level, threads);
    return r;
}

/* Rows that name queries, one of them none, score as those queries do, with argmax padded to the longest. */
int numbered(const Case &c, const Results &one, const latemax::Level &level, int threads) {
    const std::vector<int64_t> ids{2, 0, 2, 2};
    maxsim_args args = c.args;
    const int64_t n_c = args.n_c;
    std::vector<int64_t> candidates;
    for (int64_t id : ids) candidates.insert(candidates.end(), args.candidates + id * n_c, args.candidates + (id + 1) * n_c);
    for (int64_t a = 0; !c.q_offsets.empty() && a < args.q.n; ++a) {
        const int64_t length = c.q_offsets[a + 1] - c.q_offsets[a];
        args.q.l = a ? std::max(args.q.l, length) : length;
    }
    args.n_q = ids.size(), args.query_ids = ids.data(), args.candidates = candidates.data();
    std::vector<float> scores(ids.size() * n_c, 7);
    std::vector<int32_t> argmax(scores.size() * args.q.l, -99);
    args.scores = scores.data(), args.argmax = argmax.data();
    latemax::forward(args, level, threads);
    int wrong = 0;
    for (size_t r = 0; r < scores.size(); ++r) {
        const int64_t id = ids[r / n_c], slot = r % n_c, first = offset(c.q_offsets, id, args.q.l);
        wrong += std::memcmp(&scores[r], &one.scores[id * n_c + slot], 4) != 0;
        for (int64_t i = 0; i < args.q.l; ++i) {
            const bool inside = first + i < offset(c.q_offsets, id + 1, args.q.l);
            const int64_t at = c.q_offsets.empty() ? (id * n_c + slot) * args.q.l : slot * args.q.total + first;
            wrong += argmax[r * args.q.l + i] != (inside ? one.argmax[at + i] : -1);
        }
    }
    return wrong;
}

Results run(Case &c, const latemax::Level &level, int threads) {
    maxsim_args args = c.args;
    Results r = forward(args, level, threads);
    r.grad_q.assign(c.q.bytes.size(), 1), r.grad_d.assign(c.d.bytes.size(), 1);
    std::vector<float> g(args.n_q * args.n_c);
    for (size_t i = 0; i < g.size(); ++i) g[i] = static_cast<float>(i % 7) - 3;
    r.grad_weights.assign(c.weights.size(), 7);
    float *grad_weights = c.weights.empty() ? nullptr : r.grad_weights.data();
    latemax::backward(args, {g.data(), args.n_c, 1, r.grad_q.data(), r.grad_d.data(), grad_weights}, level, threads);
    return r;
}

template <class T>
bool same(const std::vector<T> &x, const std::vector<T> &y) {
    return x.size() == y.size() && (x.empty() || !std::memcmp(x.data(), y.data(), x.size() * sizeof(T)));
}

std::vector<int64_t> lengths(int64_t n, int64_t longest) {
    std::vector<int64_t> cu{0};
    for (int64_t i = 0; i < n; ++i) cu.push_back(cu.back() + random_bits() % (longest + 1));
    return cu;
}

/* Copies the ragged items of a side to buffers of their own: rows of odd items have a gap after them, and an item that
 * keeps all its tokens has no mask. */
struct Separate {
    std::vector<std::vector<char>> tokens;
    std::vector<std::vector<uint8_t>> masks;
    std::vector<maxsim_item> table;

    Separate(const Tensor &t, const std::vector<int64_t> &cu, int64_t dim) {
        const int64_t size = t.dtype == MAXSIM_F32 ? 4 : 2;
        for (size_t n = 0; n + 1 < cu.size(); ++n) {
            const int64_t length = cu[n + 1] - cu[n], stride = dim + (n % 2 ? 3 : 0);
            tokens.emplace_back(length ? ((length - 1) * stride + dim) * size : 0);
            for (int64_t r = 0; r < length; ++r)
                std::memcpy(tokens[n].data() + r * stride * size, t.bytes.data() + (cu[n] + r) * dim * size, dim * size);
            masks.emplace_back();
            bool all = true;
            for (int64_t r = cu[n]; r < cu[n + 1] && !t.mask.empty(); ++r) masks[n].push_back(t.mask[r]), all &= t.mask[r];
            table.push_back({tokens[n].data(), all ? nullptr : masks[n].data(), stride});
        }
    }
    void give(maxsim_side &side) const {
        if (table.empty()) return;
        side.tokens = nullptr, side.mask = nullptr, side.separate = table.data();
    }
};

/* form: bit 0 ragged queries; the rest 0 dense, 1 own, 2 ragged, 3 candidates */
int check(int form, maxsim_dtype dtype, Values values, bool masked, bool normalize, const latemax::Level &level) {
    Case c;
    maxsim_args &a = c.args;
    const int documents = form >> 1;
    a.n_q = 3, a.n_c = documents == 3 ? 6 : 5, a.q.l = 21;
    /* tiles of 32 elements and 16 tokens that end within, and that do not */
    const bool even = (documents + values + masked + normalize) % 2;
    a.dim = even ? 64 : 67, a.d.l = even ? 41 : 25;
    if (form & 1) c.q_offsets = lengths(a.n_q, 40), a.q.l = c.q_offsets.back();
    a.own = documents == 1 || documents == 3;
    if (documents >= 2) a.d.n = a.n_c = documents == 3 ? 6 : 5, c.d_offsets = lengths(a.d.n, 50), a.d.l = c.d_offsets.back();
    for (int64_t i = 0; documents == 3 && i < a.n_q * a.n_c; ++i) c.candidates.push_back(static_cast<int64_t>(random_bits() % 7) - 1);
    const int64_t t_q = form & 1 ? a.q.l : a.n_q * a.q.l;
    const int64_t t_d = documents >= 2 ? a.d.l : (documents == 1 ? a.n_q : 1) * a.n_c * a.d.l;
    c.q = tokens(dtype, t_q, a.dim, masked, values == DENORMAL ? ORDINARY : values);
    c.d = tokens(dtype, t_d, a.dim, masked, values);
    a.q.n = a.n_q, a.q.total = t_q, a.d.total = t_d;
    if (documents < 2) a.d.n = a.n_c;
    a.q.tokens = c.q.bytes.data(), a.d.tokens = c.d.bytes.data(), a.q.dtype = a.d.dtype = dtype;
    a.q.stride_n = a.q.l * a.dim, a.q.stride_l = a.dim, a.q.stride_k = 1;
    a.d.stride_l = a.dim, a.d.stride_k = 1, a.d.stride_n = a.d.l * a.dim, a.d.stride_q = documents == 1 ? a.n_c * a.d.stride_n : 0;
    if (masked) a.q.mask = c.q.mask.data(), a.d.mask = c.d.mask.data();
    a.q.mask_stride_n = a.q.l, a.q.mask_stride_l = a.d.mask_stride_l = 1;
    a.d.mask_stride_n = a.d.l, a.d.mask_stride_q = documents == 1 ? a.n_c * a.d.l : 0;
    if (!c.q_offsets.empty()) a.q.offsets = c.q_offsets.data();
    if (!c.d_offsets.empty()) a.d.offsets = c.d_offsets.data();
    if (!c.candidates.empty()) a.candidates = c.candidates.data();
    a.empty_score = -3, a.normalize = normalize;
    /* half of the cases are weighted, half of these take the mean */
    for (int64_t i = 0; masked && i < t_q; ++i)
        c.weights.push_back(c.q.mask[i] ? static_cast<float>(i % 5 - 2) / 2 : NOT_A_NUMBER);
    if (masked) a.weights = c.weights.data(), a.mean = normalize;
    const Results one = run(c, level, 1), three = run(c, level, 3);
    int wrong = !same(one.scores, three.scores) + !same(one.argmax, three.argmax) + !same(one.grad_q, three.grad_q) +
                !same(one.grad_d, three.grad_d) + !same(one.grad_weights, three.grad_weights);
    const Separate queries(c.q, c.q_offsets, a.dim), items(c.d, c.d_offsets, a.dim);
    for (int sides = 1; sides < 4; ++sides) {
        maxsim_args args = a;
        if (sides & 1) queries.give(args.q);
        if (sides & 2) items.give(args.d);
        const Results apart = forward(args, level, sides);
        wrong += !same(one.scores, apart.scores) + !same(one.argmax, apart.argmax);
    }
    for (int threads = 1; documents == 3 && threads < 4; threads += 2) wrong += numbered(c, one, level, threads);
    /* products of bfloat16 instructions take a denormal for 0 */
    const double tolerance = values == DENORMAL ? 1e-30 : 2e-3;
    for (int64_t q = 0; q < a.n_q; ++q)
        for (int64_t s = 0; s < a.n_c; ++s) {
            const double ours = one.scores[q * a.n_c + s];
            const double truth = pair_score(c, q, s, one.argmax.data(), tolerance, wrong);
            const bool alike = std::isfinite(truth) ? std::fabs(ours - truth) <= tolerance + 1e-5 * std::fabs(truth)
                                                    : (std::isnan(truth) ? std::isnan(ours) : ours == truth);
            wrong += !alike;
        }
    if (wrong)
        std::printf("%s form %d dtype %d values %d masked %d normalize %d: %d wrong\n", level.name, form, dtype, values,
                    masked, normalize, wrong);
    return wrong;
}

#include "codes.h"

/* Rows of nothing, of signs, and of one bit anywhere; the last row ends where the buffer does. */
int check_zero_rows(int64_t size, int64_t dim, int threads) {
    const int64_t n = 3, l = 700, bytes = size * dim, stride = bytes + size * (dim % 3);
    std::vector<char> x(n * l * stride - (stride - bytes));
    std::vector<uint8_t> out(n * l, 7), truth(n * l);
    for (int64_t r = 0; r < n * l; ++r) {
        char *row = x.data() + r * stride;
        for (int64_t k = 0; k < dim && r % 2; ++k) row[size * (k + 1) - 1] = static_cast<char>(0x80);
        if (random_bits() % 3 == 0) continue;
        const int64_t bit = random_bits() % (8 * bytes);
        row[bit / 8] = static_cast<char>(row[bit / 8] | 1 << bit % 8);
        truth[r] = bit % (8 * size) != 8 * size - 1;
    }
    const bool all = latemax::nonzero_rows({x.data(), size, n, l, dim, l * stride / size, stride / size}, out.data(), threads);
    const int wrong = all || out != truth;
    if (wrong) std::printf("zero rows of %d numbers of %d bytes\n", (int)dim, (int)size);
    return wrong;
}

}  // namespace

/* driver ordinary|all: cases with ordinary values only, or with denormals, infinities and NaN too */
int main(int argc, char **argv) {
    if (argc != 2 || (std::strcmp(argv[1], "ordinary") && std::strcmp(argv[1], "all"))) {
        std::fprintf(stderr, "usage: driver ordinary|all\n");
        return 2;
    }
    const bool all = !std::strcmp(argv[1], "all");
    const latemax::Level *levels[8];
    const int n = latemax::levels(levels);
    int wrong = 0, cases = 0;
    for (int64_t size : {2, 4, 8})
        for (int64_t dim = 1; dim < 70; ++dim, ++cases) wrong += check_zero_rows(size, dim, dim % 2 ? 3 : 1);
    for (int l = 0; l < n; ++l) wrong += codes::check_all(*levels[l], all, cases);
    for (int l = 0; l < n; ++l) {
        latemax::Level other = *levels[l];
#if defined(__x86_64__)
        /* the AMX level without tiles of bytes, which a processor may lack */
        if (!std::strcmp(other.name, "amx_bf16"))
            other.codes = &latemax::codes_avx512_vnni, wrong += codes::check_all(other, all, cases);
#endif
        wrong += codes::check_all_bytes(*levels[l], other, all, cases);
    }
    for (int l = 0; l < n; ++l)
        for (int form = 0; form < 8; ++form)
            for (maxsim_dtype dtype : {MAXSIM_F32, MAXSIM_BF16, MAXSIM_F16})
                for (Values values : {ORDINARY, DENORMAL, SPECIAL})
                    for (bool masked : {false, true})
                        for (bool normalize : {false, true}) {
                            if (values != ORDINARY && !all) continue;
                            if (values == DENORMAL && (normalize || dtype == MAXSIM_F16)) continue;
                            wrong += check(form, dtype, values, masked, normalize, *levels[l]), ++cases;
                        }
    std::printf("%d cases on %s and below: %d wrong\n", cases, levels[n - 1]->name, wrong);
    return wrong != 0;
}
