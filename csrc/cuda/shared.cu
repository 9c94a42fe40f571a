/* Small kernels before and after the forward: norms, lengths of masked documents, segments of ragged queries; the
 * maxima of shared documents and the sums over segments. */
#include "finish.h"
#include "launch.h"
#include "walk.h"

namespace latemax {

namespace {

constexpr int THREADS = 256;

/* What makes tokens unit vectors, one warp per token; tokens are at (row / l / n, row / l % n, row % l) times the strides,
 * scales one after the other. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    unit_factors(const typename T::Stored *x, const float *scales, float *out, int64_t rows, int64_t n, int64_t l,
                 int64_t stride_m, int64_t stride_n, int64_t stride_l, int dim) {
    const int thread = ptx::thread_index(), lane = thread % 32;
    const int64_t step = static_cast<int64_t>(ptx::grid_size()) * (THREADS / 32);
    for (int64_t row = static_cast<int64_t>(ptx::block_index()) * (THREADS / 32) + thread / 32; row < rows; row += step) {
        const typename T::Stored *token = x + row / l / n * stride_m + row / l % n * stride_n + row % l * stride_l;
        float sum = 0;
        for (int k = lane; k < dim; k += 32) {
            const float value = ptx::to_float(T{}, token[k]);
            sum += value * value;
        }
        for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
        if (lane == 0) out[row] = CODES<T> ? unit_factor(sqrtf(sum), scales[row]) : unit_factor(sqrtf(sum));
    }
}

/* One warp per document: masked tokens after the last kept one are neither read nor multiplied. */
__global__ void __launch_bounds__(THREADS) lengths(const __grid_constant__ Forward f, int64_t documents) {
    const maxsim_args &a = f.a;
    const int thread = ptx::thread_index(), lane = thread % 32;
    const int64_t step = static_cast<int64_t>(ptx::grid_size()) * (THREADS / 32);
    for (int64_t id = static_cast<int64_t>(ptx::block_index()) * (THREADS / 32) + thread / 32; id < documents; id += step) {
        const Query rows = a.d.offsets ? span(a.d.offsets, id, a.d.total) : Query{0, static_cast<int>(a.d.l)};
        const int64_t length = rows.length;
        const uint8_t *mask = a.d.mask + (a.d.offsets ? rows.start * a.d.mask_stride_l
                                                      : id / a.n_c * a.d.mask_stride_q + id % a.n_c * a.d.mask_stride_n);
        int end = 0;
        for (int64_t i = lane; i < length; i += 32)
            if (mask[i * a.d.mask_stride_l]) end = static_cast<int>(i) + 1;
        for (int other = 16; other > 0; other /= 2) {
            const int theirs = ptx::shuffle_xor(end, other);
            end = theirs > end ? theirs : end;
        }
        if (lane == 0) f.work.d_lengths[id] = end;
    }
}

/* Segments of a ragged query, and with own documents the places its last query block leaves empty. */
__device__ inline int64_t segments_of(const Forward &f, int64_t query) {
    const int64_t count = ceil_div(query_of(f.a, query).length, f.plan.slot);
    return count ? count : 1;
}
__device__ inline int64_t places_of(const Forward &f, int64_t query) {
    const int64_t count = segments_of(f, query), each = f.a.own ? f.plan.segments : 1;
    return ceil_div(count, each) * each;
}

constexpr int SCANNERS = 1024;

/* units[query] = the places of all queries before it; one thread block, each thread with a range of queries. */
__global__ void __launch_bounds__(SCANNERS) units(const __grid_constant__ Forward f) {
    const int thread = ptx::thread_index();
    const int64_t n = f.a.n_q, each = ceil_div(n, SCANNERS);
    int64_t *sums = reinterpret_cast<int64_t *>(ptx::dynamic_shared());
    int64_t sum = 0;
    for (int64_t i = thread * each; i < (thread + 1) * each && i < n; ++i) sum += places_of(f, i);
    int64_t before = sum;
    for (int step = 1; step < SCANNERS; step *= 2) {
        sums[thread] = before;
        ptx::block_barrier();
        if (thread >= step) before += sums[thread - step];
        ptx::block_barrier();
    }
    before -= sum;
    for (int64_t i = thread * each; i < (thread + 1) * each && i < n; ++i) {
        f.work.units[i] = static_cast<int32_t>(before);
        before += places_of(f, i);
    }
    if (thread == SCANNERS - 1) f.work.units[n] = static_cast<int32_t>(before);
}

/* Maxima of a document that this and the next `count` thread blocks of the forward shared. */
struct Pieces {
    const Forward &f;
    int64_t block, index, step;
    int count;

    __device__ Part part(int i) const { return part_of(f, block, i); }
    __device__ float weight(int, const Segment &segment, const Query &tokens, int token) const {
        return query_weight(f, segment, tokens, token);
    }
    __device__ float value(int row, int &where) const {
        const int rows = f.plan.rows;
        const auto at = [&](int64_t piece) { return piece * rows + row; };
        float best = f.work.piece_values[at(2 * index + 1)];
        if (f.a.argmax) where = f.work.piece_wheres[at(2 * index + 1)];
        for (int i = 1; i <= count; ++i) {
            const int64_t next = at(2 * (index + i * step));
            if (f.a.argmax) merge(best, where, f.work.piece_values[next], f.work.piece_wheres[next]);
            else best = ptx::max_nan(best, f.work.piece_values[next]);
        }
        return best;
    }
};

/* The document that begins in the share of a thread block of the forward and ends in another's. Only whole documents without
 * a mask are cut: the first valid token is 0. */
template <bool ARGMAX>
__global__ void __launch_bounds__(THREADS, 2) pieces(const __grid_constant__ Forward f) {
    const int thread = ptx::thread_index();
    const int64_t index = ptx::block_index();
    const Shares shares(f, ptx::grid_size());
    if (index >= shares.sharing.active) return;
    int64_t turn = 0, other = 0;
    const Cut from = shares.begin(index, turn), to = shares.begin(index + shares.step(), other);
    if (!to.inside() || (from.inside() && from.document == to.document && turn == other)) return;
    int count = 0;
    for (bool more = true; more; ++count) {
        int64_t theirs = 0;
        const Cut end = shares.begin(index + (count + 2) * shares.step(), theirs);
        more = end.inside() && end.document == to.document && theirs == other;
    }
    const int64_t block = shares.full * shares.grid + other;
    finish<ARGMAX>(f, to.document, 0, thread / 32, THREADS / 32, thread % 32,
                   Pieces{f, block, index, shares.step(), count});
}

__global__ void __launch_bounds__(THREADS) sum_parts(const __grid_constant__ Forward f) {
    const maxsim_args &a = f.a;
    const int64_t n = a.n_q * a.n_c, step = static_cast<int64_t>(ptx::grid_size()) * THREADS;
    for (int64_t i = static_cast<int64_t>(ptx::block_index()) * THREADS + ptx::thread_index(); i < n; i += step) {
        const int64_t query = i / a.n_c, first = a.q.offsets ? f.work.units[query] : query * f.plan.chunks;
        const int64_t count = a.q.offsets ? segments_of(f, query) : f.plan.chunks;
        const float *partial = f.work.partial + first * a.n_c + i % a.n_c;
        float sum = partial[0];
        for (int64_t part = 1; part < count; ++part) sum += partial[part * a.n_c];
        a.scores[i] = sum;
    }
}

int blocks(int64_t work, int64_t each) {
    const int64_t wanted = ceil_div(work, each);
    return static_cast<int>(wanted < 4096 ? wanted : 4096);
}

/* Of m x n items of l tokens. */
void norms(const maxsim_args &a, const maxsim_side &x, float *out, int64_t m, int64_t n, int64_t l, Stream stream) {
    const int64_t rows = m * n * l;
    if (!rows) return;
    const auto run = [&](auto type) {
        using T = decltype(type);
        launch(unit_factors<T>, blocks(rows, THREADS / 32), THREADS, 0, stream,
               static_cast<const typename T::Stored *>(x.tokens), x.scale, out, rows, n, l, x.stride_q, x.stride_n, x.stride_l,
               static_cast<int>(a.dim));
    };
    if (x.dtype == MAXSIM_I8) run(I8{});
    else if (x.dtype == MAXSIM_BF16) run(BF16{});
    else run(F16{});
}

}  // namespace

void prepare_shared(const Device &device) {
    prepare(unit_factors<BF16>, device.shared_block);
    prepare(unit_factors<F16>, device.shared_block);
    prepare(unit_factors<I8>, device.shared_block);
    prepare(lengths, device.shared_block);
    prepare(units, device.shared_block);
    prepare(pieces<false>, device.shared_block);
    prepare(pieces<true>, device.shared_block);
    prepare(sum_parts, device.shared_block);
}

void launch_norms(const Forward &f, Stream stream) {
    const maxsim_args &a = f.a;
    if (a.q.offsets) norms(a, a.q, f.work.q_norms, 1, 1, a.q.total, stream);
    else norms(a, a.q, f.work.q_norms, 1, a.n_q, a.q.l, stream);
    if (!f.work.d_norms) return;
    if (a.d.offsets) norms(a, a.d, f.work.d_norms, 1, 1, a.d.total, stream);
    else norms(a, a.d, f.work.d_norms, a.own ? a.n_q : 1, a.n_c, a.d.l, stream);
}

void launch_lengths(const Forward &f, Stream stream) {
    const maxsim_args &a = f.a;
    const int64_t documents = a.d.offsets ? a.d.n : (a.own ? a.n_q : 1) * a.n_c;
    if (documents) launch(lengths, blocks(documents, THREADS / 32), THREADS, 0, stream, f, documents);
}

void launch_units(const Forward &f, Stream stream) {
    launch(units, 1, SCANNERS, SCANNERS * static_cast<int>(sizeof(int64_t)), stream, f);
}

void launch_pieces(const Forward &f, Stream stream) {
    launch(f.a.argmax ? pieces<true> : pieces<false>, f.plan.grid, THREADS, 0, stream, f);
}

void launch_sum(const Forward &f, Stream stream) {
    launch(sum_parts, blocks(f.a.n_q * f.a.n_c, THREADS), THREADS, 0, stream, f);
}

}  // namespace latemax
