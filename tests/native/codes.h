/* Tokens that are codes, against plain loops in double: scores, argmax, bounds; one thread and three; items apart. */
namespace codes {

/* Codes of random tokens, and tokens within `error` of them. */
struct Tokens {
    maxsim_dtype dtype;
    int64_t n, dim, bytes;
    std::vector<int8_t> codes;
    std::vector<float> floats, scale, error;
    std::vector<double> coded, original; /* [n, dim] */
    std::vector<uint8_t> mask;

    Tokens(maxsim_dtype dtype, int64_t n, int64_t dim, bool masked, Values values)
        : dtype(dtype), n(n), dim(dim), bytes(dtype == MAXSIM_BITS ? (dim + 7) / 8 : dim), coded(n * dim),
          original(n * dim) {
        std::normal_distribution<float> normal;
        if (dtype == MAXSIM_F32) floats.resize(n * dim);
        else codes.resize(n * bytes), scale.resize(n), error.resize(n);
        for (int64_t r = 0; r < n; ++r) {
            mask.push_back(!masked || random_bits() % 3 != 0);
            if (dtype != MAXSIM_F32) scale[r] = random_bits() % 9 ? std::fabs(normal(random_bits)) + 0.01f : 0.0f;
            const float unit = values == DENORMAL && r % 2 ? 1e-38f : 1.0f;
            double apart = 0;
            for (int64_t k = 0; k < dim; ++k) {
                double &x = coded[r * dim + k];
                if (dtype == MAXSIM_F32) {
                    float &y = floats[r * dim + k] = normal(random_bits) * unit;
                    if (values == SPECIAL && k == dim / 2 && random_bits() % 20 == 0) y = r % 2 ? INF : NOT_A_NUMBER;
                    if (!mask[r]) y = NOT_A_NUMBER;
                    original[r * dim + k] = x = y;
                    continue;
                }
                const int bit = random_bits() % 2 ? 1 : -1;
                const int code = dtype == MAXSIM_I8 ? static_cast<int>(random_bits() % 255) - 127 : bit;
                if (dtype == MAXSIM_I8) codes[r * dim + k] = static_cast<int8_t>(code);
                else if (code > 0) codes[r * bytes + k / 8] |= static_cast<int8_t>(128 >> k % 8);
                x = static_cast<double>(code) * scale[r];
                const double moved = (static_cast<double>(random_bits() % 1001) / 1000 - 0.5) * scale[r];
                original[r * dim + k] = x + moved, apart += moved * moved;
            }
            if (dtype != MAXSIM_F32) error[r] = static_cast<float>(std::sqrt(apart) * (1 + 1e-6));
        }
    }
    const void *data() const { return dtype == MAXSIM_F32 ? static_cast<const void *>(floats.data()) : codes.data(); }
    void give(maxsim_side &s, bool masked) const {
        s.tokens = data(), s.dtype = dtype, s.stride_l = dtype == MAXSIM_F32 ? dim : bytes, s.stride_k = 1, s.total = n;
        s.mask = masked ? mask.data() : nullptr, s.mask_stride_l = 1;
        if (dtype != MAXSIM_F32) s.scale = scale.data(), s.error = error.data();
    }
};

double product(const std::vector<double> &q, int64_t i, const std::vector<double> &d, int64_t j, int64_t dim) {
    double s = 0;
    for (int64_t k = 0; k < dim; ++k) s += q[i * dim + k] * d[j * dim + k];
    return s;
}

std::vector<double> norms(const std::vector<double> &x, int64_t n, int64_t dim) {
    std::vector<double> out(n);
    for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(product(x, i, x, i, dim));
    return out;
}

/* form: 0 dense, 1 own, 2 ragged, 3 candidates; queries are ragged in 2 and 3 */
int check(int form, maxsim_dtype q_dtype, maxsim_dtype d_dtype, int64_t dim, Values values, bool masked, bool normalize,
          const latemax::Level &level) {
    const int64_t n_q = 3, n_c = 5, l_q = 21, l_d = 41;
    const bool ragged = form >= 2;
    std::vector<int64_t> q_offsets{0}, d_offsets{0}, candidates;
    for (int64_t a = 1; a <= n_q; ++a) q_offsets.push_back(ragged ? q_offsets.back() + random_bits() % 40 : a * l_q);
    for (int64_t a = 1; a <= (form == 1 ? n_q : 1) * n_c; ++a)
        d_offsets.push_back(ragged ? d_offsets.back() + random_bits() % 130 : a * l_d);
    for (int64_t i = 0; i < n_q * n_c; ++i) candidates.push_back(static_cast<int64_t>(random_bits() % 6) - 1);
    const Tokens q(q_dtype, q_offsets.back(), dim, masked, values), d(d_dtype, d_offsets.back(), dim, masked, ORDINARY);
    std::vector<float> weights(q.n);
    for (float &w : weights) w = static_cast<float>(random_bits() % 9) / 4 - 1;
    maxsim_args a{};
    q.give(a.q, masked), d.give(a.d, masked);
    a.dim = dim, a.n_q = a.q.n = n_q, a.n_c = a.d.n = n_c, a.q.l = ragged ? q.n : l_q, a.d.l = l_d;
    a.q.stride_n = l_q * a.q.stride_l, a.d.stride_n = l_d * a.d.stride_l;
    a.q.mask_stride_n = l_q, a.d.mask_stride_n = l_d;
    if (form == 1) a.own = 1, a.d.stride_q = n_c * a.d.stride_n, a.d.mask_stride_q = a.d.scale_stride_q = n_c * l_d;
    if (ragged) a.q.offsets = q_offsets.data(), a.d.offsets = d_offsets.data();
    if (form == 3) a.own = 1, a.candidates = candidates.data();
    a.empty_score = -3, a.normalize = normalize, a.mean = masked && normalize;
    if (masked) a.weights = weights.data();
    int wrong = 0;

    auto call = [&](int threads, bool apart, bool bounds, int coarse) {
        maxsim_args args = a;
        std::vector<maxsim_item> table;
        for (int64_t i = 0; i < n_c; ++i)
            table.push_back({d.codes.data() + d_offsets[i] * d.bytes, masked ? d.mask.data() + d_offsets[i] : nullptr,
                             d.bytes});
        if (apart) args.d.separate = table.data(), args.d.tokens = nullptr, args.d.mask = nullptr;
        std::vector<float> out(2 * n_q * n_c, 7);
        std::vector<int32_t> at(q.n * n_c, -99);
        args.scores = out.data(), args.argmax = bounds ? nullptr : at.data();
        args.upper = bounds ? out.data() + n_q * n_c : nullptr;
        args.coarse = coarse;
        latemax::forward(args, level, threads);
        return std::make_pair(out, at);
    };
    const auto one = call(1, false, false, 0);
    for (int apart = 0; apart <= ragged; ++apart) {
        const auto three = call(3, apart, false, 0);
        wrong += !same(one.first, three.first) + !same(one.second, three.second);
    }
    std::vector<float> bounds[2];
    for (int coarse = 0; d_dtype == MAXSIM_I8 && coarse < 2; ++coarse) {
        bounds[coarse] = call(1, false, true, coarse).first;
        wrong += !same(bounds[coarse], call(3, ragged, true, coarse).first);
    }
    const std::vector<double> norm[] = {norms(q.coded, q.n, dim), norms(d.coded, d.n, dim), norms(q.original, q.n, dim),
                                        norms(d.original, d.n, dim)};
    auto over = [&](int64_t i, int64_t j, int which) {
        return normalize ? std::fmax(norm[which][i], 1e-12) * std::fmax(norm[which + 1][j], 1e-12) : 1;
    };
    for (int64_t p = 0; p < n_q * n_c; ++p) {
        const int64_t query = p / n_c, document = form == 3 ? candidates[p] : form == 1 ? p : p % n_c;
        double score = 0, real = 0, tolerance = 1e-30, count = 0, some = 0;
        for (int64_t i = q_offsets[query]; i < q_offsets[query + 1]; ++i) {
            const int64_t slot = ragged ? p % n_c * q.n + i : p * l_q + i - q_offsets[query];
            const int32_t at = one.second[slot];
            double best = -INF, truth = -INF, chosen = -INF, longest = 0;
            const bool scored = q.mask[i] && document >= 0;
            for (int64_t j = scored ? d_offsets[document] : 0; scored && j < d_offsets[document + 1]; ++j) {
                if (masked && !d.mask[j]) continue;
                const double s = product(q.coded, i, d.coded, j, dim) / over(i, j, 0);
                some = 1, best = std::isnan(best) || std::isnan(s) ? NOT_A_NUMBER : std::fmax(best, s);
                truth = std::fmax(truth, product(q.original, i, d.original, j, dim) / over(i, j, 2));
                longest = std::fmax(longest, norm[1][j]);
                if (at == j - d_offsets[document]) chosen = s;
            }
            if (!q.mask[i]) {
                wrong += at != -1;
                continue;
            }
            const double w = masked ? weights[i] : 1;
            const double near = 0x1p-12 * (normalize ? 1 : norm[0][i] * longest);
            score += w * best, real += w * truth, tolerance += std::fabs(w) * near, ++count;
            if (std::isfinite(best)) wrong += !(chosen >= best - 2 * near - 1e-30);
            if (best == -INF) wrong += at != -1 && chosen != best;
        }
        if (a.mean && count) score /= count, real /= count, tolerance /= count;
        const bool empty = count && !some;
        if (!count || empty) score = real = empty ? -3 : 0, tolerance = 0;
        const double ours = one.first[p];
        const bool near = std::isinf(score) ? ours == score : std::fabs(ours - score) <= tolerance;
        wrong += !(std::isnan(score) ? std::isnan(ours) : near);
        for (const std::vector<float> &b : bounds)
            if (!b.empty() && std::isfinite(real) && std::isfinite(score))
                wrong += !(b[p] <= real && real <= b[n_q * n_c + p]);
    }
    if (wrong)
        std::printf("%s codes form %d dtypes %d %d dim %d values %d masked %d normalize %d: %d wrong\n", level.name, form,
                    q_dtype, d_dtype, (int)dim, values, masked, normalize, wrong);
    return wrong;
}

int check_all(const latemax::Level &level, bool all, int &cases) {
    int wrong = 0;
    const maxsim_dtype pairs[4][2] = {
        {MAXSIM_F32, MAXSIM_I8}, {MAXSIM_I8, MAXSIM_I8}, {MAXSIM_F32, MAXSIM_BITS}, {MAXSIM_BITS, MAXSIM_BITS}};
    for (const auto &dtypes : pairs)
        for (int form = 0; form < 4; ++form)
            for (int64_t dim : {35, 64, 300})
                for (Values values : {ORDINARY, DENORMAL, SPECIAL})
                    for (bool masked : {false, true})
                        for (bool normalize : {false, true}) {
                            if (dim == 64 && form) continue;
                            if (values != ORDINARY && (!all || dtypes[0] != MAXSIM_F32 || form % 2)) continue;
                            wrong += check(form, dtypes[0], dtypes[1], dim, values, masked, normalize, level), ++cases;
                        }
    return wrong;
}

/* int8 codes against bytes of a query: scores and argmax are those of plain integers, bit for bit, where the sums of a
 * level are exact; everything is the same, bit for bit, on a level with other instructions for bytes. */
int check_bytes(const latemax::Level &level, const latemax::Level &other, int64_t dim, int64_t l_d, bool masked,
                bool extreme, bool normalize, int64_t gap) {
    const int64_t n_c = 3, l_q = 21;
    Tokens q(MAXSIM_I8, l_q, dim, masked, ORDINARY), d(MAXSIM_I8, n_c * l_d, dim, masked, ORDINARY);
    const Tokens coarse(MAXSIM_F32, l_q, dim, masked, ORDINARY);
    for (int8_t &x : q.codes) x = extreme ? (x < 0 ? -127 : 127) : x;
    for (int8_t &x : d.codes) x = extreme ? (x < 0 ? -127 : 127) : x;
    for (int64_t k = 0; k < dim; ++k) d.codes[k] = q.codes[k];
    std::vector<int8_t> rows(n_c * l_d * (dim + gap), -128);
    for (int64_t r = 0; r < n_c * l_d; ++r) std::memcpy(rows.data() + r * (dim + gap), d.codes.data() + r * dim, dim);
    auto call = [&](const latemax::Level &on, const Tokens &tokens, bool bounds, bool normalized) {
        maxsim_args a{};
        tokens.give(a.q, masked), d.give(a.d, masked);
        a.d.tokens = rows.data(), a.d.stride_l = dim + gap, a.d.stride_n = l_d * (dim + gap), a.d.mask_stride_n = l_d;
        a.dim = dim, a.n_q = a.q.n = 1, a.n_c = a.d.n = n_c, a.q.l = l_q, a.d.l = l_d;
        a.empty_score = -3, a.normalize = normalized;
        std::vector<float> out(2 * n_c, 7);
        std::vector<int32_t> at(n_c * l_q, -99);
        a.scores = out.data(), a.coarse = bounds;
        a.upper = bounds ? out.data() + n_c : nullptr;
        a.argmax = bounds ? nullptr : at.data();
        latemax::forward(a, on, 1);
        return std::make_pair(out, at);
    };
    int wrong = 0;
    for (bool bounds : {false, true}) {
        wrong += call(level, q, bounds, normalize) != call(other, q, bounds, normalize);
        wrong += call(level, coarse, bounds, normalize) != call(other, coarse, bounds, normalize);
    }
    const auto ours = call(level, q, false, false);
    if (dim > 2 * latemax::I16_STEPS && level.codes->i8.most < 127) return wrong;
    for (int64_t c = 0; c < n_c; ++c) {
        double score = 0;
        bool empty = true;
        for (int64_t i = 0; i < l_q; ++i) {
            float best = -INF;
            int32_t at = -1;
            for (int64_t j = 0; q.mask[i] && j < l_d; ++j) {
                const int8_t *x = q.codes.data() + i * dim, *y = d.codes.data() + (c * l_d + j) * dim;
                int32_t sum = 0;
                for (int64_t k = 0; k < dim; ++k) sum += x[k] * y[k];
                const float s = static_cast<float>(sum) * d.scale[c * l_d + j];
                if (d.mask[c * l_d + j] && (at < 0 || s > best)) best = s, at = static_cast<int32_t>(j);
            }
            wrong += ours.second[c * l_q + i] != (q.scale[i] == 0 && at >= 0 ? ours.second[c * l_q + i] : at);
            if (at >= 0) score += q.scale[i] == 0 ? 0 : best * static_cast<double>(q.scale[i]), empty = false;
        }
        wrong += ours.first[c] != (empty ? -3 : static_cast<float>(score));
    }
    if (wrong)
        std::printf("%s bytes dim %d tokens %d masked %d extreme %d normalize %d gap %d: %d wrong\n", level.name, (int)dim,
                    (int)l_d, masked, extreme, normalize, (int)gap, wrong);
    return wrong;
}

int check_all_bytes(const latemax::Level &level, const latemax::Level &other, bool all, int &cases) {
    int wrong = 0;
    /* around the 16 rows and the 64 bytes of a tile */
    const int64_t lengths[] = {15, 16, 17, 31, 32, 33, 1, 65};
    std::vector<int64_t> dims{517};
    if (all) dims.insert(dims.end(), {1030, 4096});
    for (int64_t dim = all ? 1 : 63; dim <= (all ? 130 : 65); ++dim) dims.push_back(dim);
    for (int64_t dim : dims)
        for (int way = 0; way < 4; ++way, ++cases)
            wrong += check_bytes(level, other, dim, lengths[(dim + 3 * way) % 8], way & 1, (dim + way) % 3 == 0, way & 2,
                                 (dim + way) % 2 ? 0 : 3 + dim % 62);
    return wrong;
}

}  // namespace codes
