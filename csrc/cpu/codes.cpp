#include "codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace latemax {

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

/* Where the numbers of one lane of the panel are. */
struct Lane {
    char *out;
    int64_t stride, steps;

    void put16(int64_t k, long x) const { put(k / 2, k % 2 * 2, static_cast<int16_t>(x)); }
    void put8(int64_t k, long x) const { put(k / 4, k % 4, static_cast<int8_t>(x)); }
    template <class T>
    void put_extra(int64_t i, T x) const {
        put(steps + i, 0, x);
    }
    template <class T>
    void put(int64_t step, int64_t byte, T x) const {
        std::memcpy(out + 4 * step * stride + byte, &x, sizeof x);
    }
};

/* Never subnormal: a processor that flushes those would lose the bound. */
float rounded_up(double x) {
    constexpr float TINY = std::numeric_limits<float>::min();
    const float y = static_cast<float>(x);
    if (std::fabs(x) < TINY) return x > 0 ? TINY : 0.0f;
    return y < x ? std::nextafter(y, std::numeric_limits<float>::infinity()) : y;
}

/* How far a token over its norm is from its code over the code's norm. */
double unit_error(double length, double error) {
    const double sum = 2 * length - error;
    return length - error > 2e-12 && 2 * error < 2 * sum ? 2 * error / sum * (1 + 1e-9) : 2;
}

/* Position of dim k in a row of 16-bit numbers: those made of bits have the least significant bit of a byte first. */
int64_t place(const maxsim_args &args, int64_t k) { return args.d.dtype == MAXSIM_BITS ? k ^ 7 : k; }

/* Numbers of 16 bits, with a factor for each block of dims. The 1-norm is brought to at most 1/2, exactly, so that no
 * product overflows. */
CodeToken pack_i16(const maxsim_args &args, const Lane &lane, const float *x, double divisor, double size, double norm) {
    int exponent = 0;
    std::frexp(2 * size / divisor, &exponent);
    const double unit = std::ldexp(1.0, exponent), by = 1 / (divisor * unit);
    double apart = 0;
    for (int64_t b = 0; 2 * I16_STEPS * b < args.dim; ++b) {
        const int64_t first = 2 * I16_STEPS * b, end = std::min(first + 2 * I16_STEPS, args.dim);
        double top = 0;
        for (int64_t k = first; k < end; ++k) top = std::max(top, std::fabs(x[k] * by));
        const float step = static_cast<float>(top / 32767);
        const bool some = step >= std::numeric_limits<float>::min();
        const double steps = some ? by / step : 0, one = some ? step / by : 0;
        for (int64_t k = first; k < end; ++k) {
            const long code = std::lrint(x[k] * steps);
            lane.put16(place(args, k), code);
            const double left = x[k] - code * one;
            apart += left * left;
        }
        lane.put_extra(b, some ? step : 0.0f);
    }
    lane.put_extra(extra_of(I16, lane.steps) - 1, rounded_up(norm > 0 ? norm * by * (1 + 1e-9) : 1));
    if (norm == 0) return {0, 0, false};
    return {unit, std::sqrt(apart) / norm, false};
}

CodeToken pack_float(const maxsim_args &args, const Level &level, Form form, const Lane &lane, const float *x) {
    double size = 0, squares = 0, top = 0;
    for (int64_t k = 0; k < args.dim; ++k) {
        const double y = x[k];
        size += std::fabs(y), squares += y * y, top = std::max(top, std::fabs(y));
    }
    const int64_t radius = extra_of(form, lane.steps) - 1;
    /* infinity / infinity */
    if (std::isnan(size) || (std::isinf(size) && args.normalize)) return {std::nan(""), 0, false};
    if (std::isinf(size)) {
        lane.put_extra(radius, std::numeric_limits<float>::infinity());
        return {1, 0, true};
    }
    const double norm = std::sqrt(squares), divisor = args.normalize ? std::max(norm, 1e-12) : 1;
    if (form == I16) return pack_i16(args, lane, x, divisor, size, norm);
    if (top == 0) {
        lane.put_extra(radius, 1.0f);
        return {0, 0, false};
    }
    const double step = top / level.codes->i8.most;
    double apart = 0;
    long sum = 0;
    for (int64_t k = 0; k < args.dim; ++k) {
        const long code = std::lrint(x[k] / step);
        lane.put8(k, code), sum += code;
        apart += (x[k] - code * step) * (x[k] - code * step);
    }
    lane.put_extra(0, static_cast<int32_t>(-level.codes->i8.offset * sum));
    lane.put_extra(radius, rounded_up(norm / step * (1 + 1e-9)));
    return {step / divisor, std::sqrt(apart) / norm, false};
}

CodeToken pack_int8(const maxsim_args &args, const Level &level, Form form, const Lane &lane, const int8_t *x,
                    double scale, double error) {
    long sum = 0, squares = 0;
    for (int64_t k = 0; k < args.dim; ++k) {
        const int code = scale == 0 ? 0 : x[k];
        form == I8 ? lane.put8(k, code) : lane.put16(k, code);
        sum += code, squares += code * code;
    }
    const int64_t radius = extra_of(form, lane.steps) - 1;
    if (form == I8) lane.put_extra(0, static_cast<int32_t>(-level.codes->i8.offset * sum));
    for (int64_t b = 0; form == I16 && b < radius; ++b) lane.put_extra(b, 1.0f);
    const double norm = std::sqrt(static_cast<double>(squares)), length = scale * norm;
    if (!args.upper) return {!args.normalize ? scale : length < EPS ? scale / EPS : 1 / norm, 0, false};
    double unit = scale;
    if (args.normalize) error = unit_error(length, error), unit = norm > 0 ? 1 / norm : 1;
    if (unit == 0) unit = error > 0 ? error : 1;
    /* a bound of the code's norm and of its error */
    const double bound = std::max(unit * norm, error);
    lane.put_extra(radius, rounded_up(bound > 0 ? bound / unit * (1 + 1e-9) : 1));
    return {unit, bound > 0 ? error / bound : 0, false};
}

double element(const maxsim_args &args, const char *row, int64_t k) {
    if (args.d.dtype == MAXSIM_I8) return static_cast<signed char>(row[k]);
    return row[k / 8] >> (7 - k % 8) & 1 ? 1 : -1;
}

}  // namespace

Form form_of(const maxsim_args &args, const Level &level) {
    if (is_code(args.d.dtype)) {
        if (args.q.dtype == MAXSIM_BITS) return BITS;
        const int most = level.codes->i8.most;
        return args.d.dtype == MAXSIM_I8 && (args.q.dtype == MAXSIM_I8 ? most == 127 : args.coarse && most) ? I8 : I16;
    }
    const bool bf16 = args.q.dtype == MAXSIM_BF16 && args.d.dtype == MAXSIM_BF16 && args.d.stride_k == 1;
    return level.run_bf16 && bf16 ? BF16 : F32;
}

CodeToken pack_codes(const maxsim_args &args, const Level &level, Form form, int64_t query, int64_t token, char *out,
                     int64_t stride, float *wide) {
    const Item from = item(args.q, 0, query);
    const char *x = from.tokens + token * from.stride;
    const Lane lane{out, stride, steps_of(form, row_dims(args, form))};
    for (int64_t k = 0; k < panel_height(args, form); ++k) lane.put(k, 0, 0);
    if (form == BITS) {
        for (int64_t k = 0; k < (args.dim + 7) / 8; ++k) lane.put(k / 4, k % 4, x[k]);
        const double scale = from.scale[token], length = scale * std::sqrt(static_cast<double>(args.dim));
        /* its signs are no zeros */
        const bool zero = scale == 0;
        return {args.normalize ? scale / std::max(length, static_cast<double>(EPS)) : scale, 0, zero};
    }
    if (args.q.dtype == MAXSIM_I8)
        return pack_int8(args, level, form, lane, reinterpret_cast<const int8_t *>(x), from.scale[token],
                         from.error ? from.error[token] : 0);
    widen_row(level, args.q.dtype, x, args.q.stride_k, args.dim, wide);
    return pack_float(args, level, form, lane, wide);
}

void infinite_maximum(const maxsim_args &args, const Level &level, int64_t query, int64_t token, const Item &document,
                      int64_t length, float *best, int32_t *at) {
    if (args.q.dtype == MAXSIM_BITS) {
        int64_t first = 0;
        while (document.mask && !document.mask[first * document.mask_stride]) ++first;
        *best = 0;
        if (at) *at = static_cast<int32_t>(first);
        return;
    }
    const Item from = item(args.q, 0, query);
    std::vector<float> q(args.dim);
    widen_row(level, args.q.dtype, from.tokens + token * from.stride, args.q.stride_k, args.dim, q.data());
    *best = -std::numeric_limits<float>::infinity();
    bool found = false;
    for (int64_t j = 0; j < length && !std::isnan(*best); ++j) {
        if (document.mask && !document.mask[j * document.mask_stride]) continue;
        double sum = 0;
        for (int64_t k = 0; k < args.dim; ++k)
            sum += q[k] * (document.scale[j] * element(args, document.tokens + j * document.stride, k));
        if (found && !(sum > *best) && !std::isnan(sum)) continue;
        *best = static_cast<float>(sum), found = true;
        if (at) *at = static_cast<int32_t>(j);
    }
}

void read_codes(const maxsim_args &args, const Level &level, Form form, const Item &document, float query_error, char *to,
                Rows &rows) {
    auto copy = [&](const float *from, float *out) {
        if (!from)
            std::fill_n(out, rows.count, 0.0f);
        else if (!rows.number)
            std::copy_n(from + rows.first, rows.count, out);
        else
            for (int64_t i = 0; i < rows.count; ++i) out[i] = from[rows.number[i]];
    };
    copy(document.scale, rows.scale);
    if (rows.radius) copy(document.error, rows.radius);
    /* of each block the conversion, the factor and the addition; then the row's factor and the sum with the radius. The
     * code of a query token is at most twice as long as the token. */
    const int64_t dim = row_dims(args, form);
    const int64_t blocks = form == I16 ? (steps_of(form, dim) + I16_STEPS - 1) / I16_STEPS : 1;
    const float rounding = static_cast<float>(2 * (blocks + 8) * 0x1p-24);
    const float norm_of_bits = std::sqrt(static_cast<float>(args.dim));
    level.codes->rewrite({args.d.dtype, form, rows.base, rows.stride, rows.gather, rows.count, dim, to, args.normalize != 0,
                          norm_of_bits, rows.scale, rows.radius, query_error, rounding});
    /* of rows that nothing has read yet a tile prefetches the next itself */
    if (form != I8 || read_first(args, form, to))
        rows.prefetch = rows.base + (rows.gather ? rows.gather[rows.count - 1] + 1 : rows.count) * rows.stride;
    if (to) rows.base = to, rows.stride = 4 * steps_of(form, dim), rows.gather = nullptr;
}

void sum_bounds(const maxsim_args &args, const Queries &queries, int64_t query, const float *lower, const float *upper,
                float *score_lower, float *score_upper) {
    const int64_t first = queries.row_begin[query], n = queries.row_begin[query + 1] - first;
    const float *weights = args.weights ? args.weights + query_begin(args, query) : nullptr;
    double low = 0, high = 0, low_size = 0, high_size = 0;
    bool nan = false;
    for (int64_t i = 0; i < n; ++i) {
        const double scale = queries.scale[first + i], weight = weights ? weights[queries.token[first + i]] : 1;
        nan |= std::isnan(scale);
        /* a product that overflowed bounds nothing */
        double x = (lower[i] < INF ? lower[i] : -INF) * scale * weight;
        double y = (upper[i] > -INF ? upper[i] : INF) * scale * weight;
        if (weight < 0) std::swap(x, y);
        low += x, high += y, low_size += std::fabs(x), high_size += std::fabs(y);
    }
    const double count = args.mean && n ? static_cast<double>(n) : 1, relative = static_cast<double>(n + 4) * 0x1p-52;
    low = (low - low_size * relative) / count, high = (high + high_size * relative) / count;
    const double unknown = nan ? std::nan("") : INF;
    /* infinity times 0, and infinity - infinity */
    if (nan || std::isnan(low)) low = -unknown;
    if (nan || std::isnan(high)) high = unknown;
    /* not -0 for a query without tokens, whatever part it is in */
    *score_lower = 0.0f - rounded_up(-low), *score_upper = rounded_up(high);
}

}  // namespace latemax
