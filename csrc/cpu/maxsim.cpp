/* Forward: cuts the documents into units of work and reads the tokens of each unit once, in batches that fit in L2.
 *
 *     unit   = one part of the query rows x a few documents; a free thread takes the next one
 *     batch  = valid tokens of those documents, at most BATCH_BYTES: multiplied with every panel vector while in L2
 *     slot   = the running maxima of one document, one per query row
 */
#include <algorithm>
#include <atomic>
#include <limits>

#include "codes.h"
#include "maxsim_cpu.h"
#include "threads.h"

namespace latemax {
namespace {

/* a quarter of the smallest L2 of processors with AVX-512, so that the panel stays in L2 as well */
constexpr int64_t BATCH_BYTES = 256 << 10;
/* the same for rows that are widened first: the next rows are prefetched meanwhile and share the cache */
constexpr int64_t WIDE_BATCH_BYTES = 64 << 10;
/* the same for codes: rewritten rows are not prefetched again, and stay in L1 */
constexpr int64_t CODE_BATCH_BYTES = 12 << 10;
/* tokens of a unit of codes: the rows prefetched after a batch are mostly of the same unit, and thread */
constexpr int64_t CODE_UNIT_TOKENS = 4096;
/* the most running maxima that a thread keeps */
constexpr int64_t SLOT_FLOATS = 256 << 10;
/* products that are worth another thread while it still spins from the last call: about 6 us */
constexpr double THREAD_PRODUCTS = 3e5;
/* the same if it sleeps: waking it can take longer than a smaller problem */
constexpr double WAKE_PRODUCTS = 1e6;

struct Document {
    Item item;
    int64_t length = 0;
};

/* Candidates first .. end, scored against one part of the query rows. The scores of the part's first query are row `row`. */
struct Unit {
    int64_t part, row, first, end, tokens;
};

/* Memory of one thread: slots of unfinished documents, and the batch of tokens not yet multiplied. */
struct Scratch {
    Buffer<int32_t> number, at;
    Buffer<float> scale, radius, wide, best, upper;
    std::vector<Rows> rows;
    std::vector<int64_t> slot_of_rows, document_of_slot;
};

class Forward {
  public:
    Forward(const maxsim_args &args, const Level &level, int threads);
    void run();

  private:
    Document document(int64_t row, int64_t c) const;
    int64_t length(int64_t row, int64_t c) const;
    int64_t tokens() const;
    int useful_threads(int64_t tokens) const;
    std::vector<Unit> units(int64_t target) const;
    void unit(const Unit &u, Scratch &s);
    Rows take(const Document &doc, int64_t &j, int64_t room, int64_t used, Scratch &s) const;
    void multiply(const Part &part, Scratch &s) const;
    void finish(const Part &part, int64_t row, int64_t c, float *best, int32_t *at, const float *upper);
    void finish_empty(const Part &part, int64_t row, int64_t c);
    void sum(int64_t query, int64_t row, int64_t c, const float *best);

    const maxsim_args &args_;
    const Level &level_;
    const int threads_;
    const Form form_;
    const int64_t row_bytes_; /* of a row as it is multiplied */
    const bool widen_, own_;
    const int64_t batch_;
    Queries queries_;
    float query_error_ = 0;
    /* maxima of all rows [n_c, rows] if parts cut through queries: summed at the end, in the order of the tokens */
    std::vector<float> maxima_;
    std::vector<char> empty_; /* [n_c], used with maxima_ */
};

/* Rows are multiplied in place if they have the form already, with contiguous dims. */
bool in_place(const maxsim_args &args, const Level &level, Form form) {
    if (form == I8) return !level.codes->i8.offset;
    if (form > BF16) return form == BITS && (args.dim + 7) / 8 % 4 == 0;
    return args.d.stride_k == 1 && (form == BF16 || args.d.dtype == MAXSIM_F32);
}

Forward::Forward(const maxsim_args &args, const Level &level, int threads)
    : args_(args),
      level_(level),
      threads_(threads),
      form_(form_of(args, level)),
      row_bytes_(form_ == BF16 ? 2 * args.dim : 4 * steps_of(form_, row_dims(args, form_))),
      widen_(!in_place(args, level, form_)),
      /* candidates expanded over the queries are shared after all */
      own_(args.query_ids || (args.n_q > 1 && (args.d.stride_q != 0 || args.d.mask_stride_q != 0 ||
                                               args.d.scale_stride_q != 0 || args.candidates))),
      batch_(std::clamp<int64_t>((!read_first(args, form_, widen_) ? BATCH_BYTES
                                  : form_ > BF16                  ? CODE_BATCH_BYTES
                                                                  : WIDE_BATCH_BYTES) / row_bytes_ / 24 * 24, 24, 4096)),
      queries_(args, level, form_) {}

Document Forward::document(int64_t row, int64_t c) const {
    const int64_t tokens = length(row, c);
    /* candidate -1 is no item */
    return {tokens ? item(args_.d, row, document_number(args_, row, c)) : Item{}, tokens};
}

int64_t Forward::length(int64_t row, int64_t c) const {
    if (!args_.d.offsets) return args_.d.l;
    const int64_t number = document_number(args_, row, c);
    return number < 0 ? 0 : args_.d.offsets[number + 1] - args_.d.offsets[number];
}

/* Document tokens to read; tokens that queries share count once. */
int64_t Forward::tokens() const {
    if (!args_.d.offsets) return (own_ ? args_.n_q : 1) * args_.n_c * args_.d.l;
    if (!args_.candidates) return args_.d.offsets[args_.d.n];
    int64_t total = 0;
    for (int64_t a = 0; a < args_.n_q; ++a)
        for (int64_t c = 0; c < args_.n_c; ++c) total += length(a, c);
    return total;
}

int Forward::useful_threads(int64_t tokens) const {
    const double rows = static_cast<double>(queries_.rows()) / static_cast<double>(own_ ? args_.q.n : 1);
    const double products = static_cast<double>(tokens) * std::max(rows, 16.0) * static_cast<double>(args_.dim);
    if (products < 2 * THREAD_PRODUCTS) return 1;
    const double share = recent_call() ? THREAD_PRODUCTS : WAKE_PRODUCTS;
    return std::max(1, static_cast<int>(std::min<double>(threads_, products / share)));
}

/* Units of about `target` tokens, whatever the lengths of documents. Longer documents come first, so that no
 * thread is left waiting for one. */
std::vector<Unit> Forward::units(int64_t target) const {
    std::vector<Unit> out;
    /* with own documents a part is a query */
    const int64_t n = own_ ? args_.n_q : static_cast<int64_t>(queries_.parts.size());
    for (int64_t p = 0; p < n; ++p) {
        const int64_t part = own_ ? query_number(args_, p) : p;
        Unit next{part, own_ ? p : queries_.parts[part].query_first, 0, 0, 0};
        while (next.end < args_.n_c) {
            const int64_t more = std::max<int64_t>(1, length(next.row, next.end));
            if (next.tokens && next.tokens + more > target) {
                out.push_back(next);
                next.first = next.end, next.tokens = 0;
            }
            ++next.end, next.tokens += more;
        }
        out.push_back(next);
    }
    if (args_.d.offsets)
        std::stable_partition(out.begin(), out.end(), [&](const Unit &u) { return u.tokens > target; });
    return out;
}

void Forward::run() {
    const int64_t total = tokens();
    const int threads = useful_threads(total);
    /* too few shared documents for all threads: cut the query rows as well */
    const int64_t wanted = threads > 1 && args_.n_c < 4 * threads ? 4 * threads : 1;
    const bool split = !own_ && wanted > 1 && args_.n_q < threads && !args_.upper;
    queries_.cut(own_, split ? threads : wanted, split);
    queries_.pack(threads);
    for (const double error : queries_.error)
        query_error_ = std::max(query_error_, static_cast<float>(error * (1 + 1e-6)));
    const int64_t places = args_.query_ids ? args_.n_q * args_.q.l : args_.q.total;
    if (args_.argmax && (queries_.rows() < args_.q.total || (args_.query_ids && args_.q.offsets)))
        std::fill_n(args_.argmax, args_.n_c * places, -1);
    if (split) {
        maxima_.resize(args_.n_c * queries_.rows());
        empty_.resize(args_.n_c);
    }
    const int64_t scored = own_ ? total : total * static_cast<int64_t>(queries_.parts.size());
    const std::vector<Unit> work = units(
        std::clamp<int64_t>(scored / (8 * threads), 1, form_ > BF16 ? CODE_UNIT_TOKENS : batch_));
    std::atomic<size_t> next{0};
    auto body = [&] {
        static thread_local Scratch scratch;
        for (size_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < work.size();)
            unit(work[u], scratch);
    };
    parallel(threads, body);
    for (int64_t c = 0; split && c < args_.n_c; ++c)
        for (int64_t a = 0; a < args_.n_q; ++a)
            if (!empty_[c]) sum(a, a, c, maxima_.data() + c * queries_.rows() + queries_.row_begin[a]);
}

void Forward::unit(const Unit &u, Scratch &s) {
    const Part &part = queries_.parts[u.part];
    const int64_t width = part.vectors * level_.lanes, first = u.first, end = u.end;
    /* queries without a valid token read no documents */
    for (int64_t c = first; !width && c < end; ++c) finish_empty(part, u.row, c);
    if (!width) return;
    const int64_t slots = std::clamp<int64_t>(SLOT_FLOATS / width, 1, end - first);
    float *best = s.best.get(slots * width);
    int32_t *at = args_.argmax ? s.at.get(slots * width) : nullptr;
    float *upper = args_.upper ? s.upper.get(slots * width) : nullptr;
    /* factors are computed for whole vectors of rows */
    s.number.get(batch_), s.scale.get(batch_ + level_.lanes), s.radius.get(batch_ + level_.lanes);
    s.wide.get(widen_ ? batch_ * row_bytes_ / 4 : 8 * (row_bytes_ + 64));
    s.rows.clear(), s.slot_of_rows.clear(), s.document_of_slot.clear();
    int64_t used = 0;
    for (int64_t c = first; c < end; ++c) {
        const Document doc = document(u.row, c);
        int64_t j = 0;
        bool started = false;
        while (j < doc.length) {
            if (used == batch_) {
                multiply(part, s);
                used = 0;
            }
            const Rows rows = take(doc, j, batch_ - used, used, s);
            if (!rows.count) continue;
            const int64_t slot = static_cast<int64_t>(s.document_of_slot.size()) - started;
            if (!started) {
                started = true;
                s.document_of_slot.push_back(c);
                std::fill_n(best + slot * width, width, -std::numeric_limits<float>::infinity());
                if (upper) std::fill_n(upper + slot * width, width, -std::numeric_limits<float>::infinity());
                /* if every similarity is -inf, argmax is the first valid token */
                const int64_t first_valid = rows.number ? rows.number[0] : rows.first;
                if (at) std::fill_n(at + slot * width, width, static_cast<int32_t>(first_valid));
            }
            s.rows.push_back(rows);
            s.slot_of_rows.push_back(slot);
            used += rows.count;
        }
        if (!started) finish_empty(part, u.row, c);
        if (c + 1 < end && static_cast<int64_t>(s.document_of_slot.size()) < slots) continue;
        multiply(part, s);
        used = 0;
        for (size_t slot = 0; slot < s.document_of_slot.size(); ++slot)
            finish(part, u.row, s.document_of_slot[slot], best + slot * width, at ? at + slot * width : nullptr,
                   upper ? upper + slot * width : nullptr);
        s.document_of_slot.clear();
    }
}

/* Takes the next valid tokens from j, at most `room`, and moves j after them. */
Rows Forward::take(const Document &doc, int64_t &j, int64_t room, int64_t used, Scratch &s) const {
    const int64_t stride = doc.item.stride, first = j;
    Rows rows{doc.item.tokens, stride, nullptr, nullptr, nullptr, stride, nullptr, nullptr, first, 0, false, false, nullptr};
    int32_t *number = s.number.get(batch_) + used;
    if (doc.item.mask) {
        for (; j < doc.length && rows.count < room; ++j) {
            number[rows.count] = static_cast<int32_t>(j);
            rows.count += doc.item.mask[j * doc.item.mask_stride] != 0;
        }
        /* consecutive tokens need no gather: the case of a ragged list */
        if (rows.count && number[rows.count - 1] - number[0] + 1 == rows.count) {
            rows.first = number[0];
        } else {
            rows.number = rows.gather = number;
        }
    } else {
        rows.count = std::min(room, doc.length - j);
        j += rows.count;
    }
    if (!rows.gather) rows.base += rows.first * stride;
    rows.scratch = reinterpret_cast<char *>(s.wide.get(0));
    if (form_ > BF16) {
        if (!rows.count) return rows;
        rows.scale = s.scale.get(0) + used;
        rows.radius = args_.upper ? s.radius.get(0) + used : nullptr;
        rows.dense = stride == args_.dim;
        char *to = widen_ ? rows.scratch + used * row_bytes_ : nullptr;
        read_codes(args_, level_, form_, doc.item, query_error_, to, rows);
        return rows;
    }
    rows.dense = args_.d.stride_k == 1 && stride == args_.dim * item_size(args_.d.dtype);
    if (args_.normalize) rows.scale = s.scale.get(batch_) + used;
    if (widen_) {
        float *wide = s.wide.get(batch_ * args_.dim) + used * args_.dim;
        auto number = [&](int64_t i) { return rows.gather ? rows.gather[i] : i; };
        /* rows that follow each other are widened together, and the next ones prefetched while these are multiplied */
        for (int64_t i = 0, end; i < rows.count; i = end) {
            for (end = i + 1; rows.dense && end < rows.count && number(end) == number(end - 1) + 1;) ++end;
            const char *from = rows.base + number(i) * stride;
            if (rows.dense) level_.widen(args_.d.dtype, from, (end - i) * args_.dim, wide + i * args_.dim);
            else widen_row(level_, args_.d.dtype, from, args_.d.stride_k, args_.dim, wide + i * args_.dim);
        }
        if (rows.dense && rows.count) rows.prefetch = rows.base + (number(rows.count - 1) + 1) * stride;
        rows.base = reinterpret_cast<const char *>(wide);
        rows.stride = args_.dim * 4;
        rows.gather = nullptr;
    }
    return rows;
}

void Forward::multiply(const Part &part, Scratch &s) const {
    const int64_t width = part.vectors * level_.lanes, dim = row_dims(args_, form_);
    const CodeLevel &codes = *level_.codes;
    const ::latemax::Run runs[] = {level_.run_f32, level_.run_bf16, codes.i16, codes.i8.run, codes.bits}, run = runs[form_];
    const Bounds bounds = form_ == I8 ? codes.i8.bounds : codes.bounds_i16;
    float *upper = args_.upper ? s.upper.get(0) : nullptr;
    float *best = s.best.get(0);
    int32_t *at = args_.argmax ? s.at.get(0) : nullptr;
    for (int64_t v = 0; v < part.vectors; v += queries_.block(part, v)) {
        const char *panel = queries_.panel(part, v);
        const int vectors = queries_.block(part, v);
        for (size_t r = 0; r < s.rows.size(); ++r) {
            const int64_t lane = s.slot_of_rows[r] * width + v * level_.lanes;
            s.rows[r].compute_scale = args_.normalize && v == 0 && form_ <= BF16;
            if (upper)
                bounds(panel, vectors, s.rows[r], dim, best + lane, upper + lane, queries_.last(part, v));
            else
                run(panel, vectors, s.rows[r], dim, best + lane, at ? at + lane : nullptr);
        }
    }
    s.rows.clear(), s.slot_of_rows.clear();
}

void Forward::finish(const Part &part, int64_t row, int64_t c, float *best, int32_t *at, const float *upper) {
    for (int64_t a = part.query_first; a < part.query_end; ++a, ++row) {
        const int64_t first = std::max(queries_.row_begin[a], part.row_first);
        const int64_t end = std::min(queries_.row_begin[a + 1], part.row_end);
        for (int64_t i = first; !queries_.infinite.empty() && !upper && i < end; ++i) {
            const int64_t lane = i - part.row_first;
            if (!queries_.infinite[i]) continue;
            const Document doc = document(row, c);
            infinite_maximum(args_, level_, a, queries_.token[i], doc.item, doc.length, best + lane,
                             at ? at + lane : nullptr);
        }
        for (int64_t i = first; at && i < end; ++i)
            argmax_row(args_, row, c)[queries_.token[i]] = at[i - part.row_first];
        const int64_t score = row * args_.n_c + c;
        if (upper)
            sum_bounds(args_, queries_, a, best + (first - part.row_first), upper + (first - part.row_first),
                       args_.scores + score, args_.upper + score);
        else if (maxima_.empty())
            sum(a, row, c, best + (first - part.row_first));
        else if (first < end)
            std::copy(best + (first - part.row_first), best + (end - part.row_first),
                      maxima_.data() + c * queries_.rows() + first);
    }
}

void Forward::finish_empty(const Part &part, int64_t row, int64_t c) {
    if (part.row_first != queries_.row_begin[part.query_first]) return;
    for (int64_t a = part.query_first; a < part.query_end; ++a, ++row) {
        const bool valid = queries_.row_begin[a] < queries_.row_begin[a + 1];
        if (args_.argmax) std::fill_n(argmax_row(args_, row, c), query_length(args_, a), -1);
        args_.scores[row * args_.n_c + c] = valid ? static_cast<float>(args_.empty_score) : 0.0f;
        if (args_.upper) args_.upper[row * args_.n_c + c] = args_.scores[row * args_.n_c + c];
    }
    if (!empty_.empty()) empty_[c] = 1;
}

/* Sums in float64, in the order of the tokens: rounded once, independent of the level's vector length. A weighted maximum
 * is exact there. */
void Forward::sum(int64_t query, int64_t row, int64_t c, const float *best) {
    double total = 0;
    const int64_t first = queries_.row_begin[query], n = queries_.row_begin[query + 1] - first;
    const double *scale = queries_.scale.empty() ? nullptr : queries_.scale.data() + first;
    if (args_.weights) {
        const float *weights = args_.weights + query_begin(args_, query);
        const int32_t *token = queries_.token.data() + first;
        for (int64_t i = 0; i < n; ++i)
            total += static_cast<double>(scale ? best[i] * scale[i] : best[i]) * weights[token[i]];
    } else {
        for (int64_t i = 0; i < n; ++i) total += scale ? best[i] * scale[i] : best[i];
    }
    if (args_.mean && n) total /= static_cast<double>(n);
    args_.scores[row * args_.n_c + c] = static_cast<float>(total);
}

}  // namespace

void forward(const maxsim_args &args, const Level &level, int threads) {
    if (!args.n_q || !args.n_c) return;
    Forward(args, level, threads).run();
    note_call();
}

}  // namespace latemax
