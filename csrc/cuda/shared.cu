/* Small kernels before and after the forward: inverse norms, lengths of masked documents, the sum over a long query's chunks. */
#include "items.h"
#include "launch.h"

namespace latemax {

namespace {

constexpr int THREADS = 256;

/* One warp per token; tokens are at (row / l / n, row / l % n, row % l) times the strides. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    inverse_norms(const uint16_t *x, float *out, int64_t rows, int64_t n, int64_t l, int64_t stride_m, int64_t stride_n,
                  int64_t stride_l, int dim) {
    const int thread = ptx::thread_index(), lane = thread % 32;
    const int64_t step = static_cast<int64_t>(ptx::grid_size()) * (THREADS / 32);
    for (int64_t row = static_cast<int64_t>(ptx::block_index()) * (THREADS / 32) + thread / 32; row < rows; row += step) {
        const uint16_t *token = x + row / l / n * stride_m + row / l % n * stride_n + row % l * stride_l;
        float sum = 0;
        for (int k = lane; k < dim; k += 32) {
            const float value = ptx::to_float(T{}, token[k]);
            sum += value * value;
        }
        for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
        if (lane == 0) {
            const float norm = sqrtf(sum);
            // not fmaxf, which would hide a NaN
            out[row] = 1.0f / (norm < 1e-12f ? 1e-12f : norm);
        }
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

__global__ void __launch_bounds__(THREADS) sum_parts(const float *partial, float *scores, int64_t n, int parts) {
    const int64_t step = static_cast<int64_t>(ptx::grid_size()) * THREADS;
    for (int64_t i = static_cast<int64_t>(ptx::block_index()) * THREADS + ptx::thread_index(); i < n; i += step) {
        float sum = partial[i];
        for (int part = 1; part < parts; ++part) sum += partial[part * n + i];
        scores[i] = sum;
    }
}

int blocks(int64_t work, int64_t each) {
    const int64_t wanted = ceil_div(work, each);
    return static_cast<int>(wanted < 4096 ? wanted : 4096);
}

void norms(const maxsim_args &a, const void *x, float *out, int64_t m, int64_t n, int64_t l, int64_t stride_m,
           int64_t stride_n, int64_t stride_l, Stream stream) {
    const int64_t rows = m * n * l;
    if (!rows) return;
    launch(a.q.dtype == MAXSIM_BF16 ? inverse_norms<BF16> : inverse_norms<F16>, blocks(rows, THREADS / 32), THREADS, 0,
           stream, static_cast<const uint16_t *>(x), out, rows, n, l, stride_m, stride_n, stride_l, static_cast<int>(a.dim));
}

}  // namespace

void prepare_shared(const Device &device) {
    prepare(inverse_norms<BF16>, device.shared_block);
    prepare(inverse_norms<F16>, device.shared_block);
    prepare(lengths, device.shared_block);
    prepare(sum_parts, device.shared_block);
}

void launch_norms(const Forward &f, bool documents, Stream stream) {
    const maxsim_args &a = f.a;
    if (a.q.offsets) norms(a, a.q.tokens, f.work.q_inverse_norms, 1, 1, a.q.total, 0, 0, a.q.stride_l, stream);
    else norms(a, a.q.tokens, f.work.q_inverse_norms, 1, a.n_q, a.q.l, 0, a.q.stride_n, a.q.stride_l, stream);
    if (!documents) return;
    if (a.d.offsets) norms(a, a.d.tokens, f.work.d_inverse_norms, 1, 1, a.d.total, 0, 0, a.d.stride_l, stream);
    else norms(a, a.d.tokens, f.work.d_inverse_norms, a.own ? a.n_q : 1, a.n_c, a.d.l, a.d.stride_q, a.d.stride_n, a.d.stride_l, stream);
}

void launch_lengths(const Forward &f, Stream stream) {
    const maxsim_args &a = f.a;
    const int64_t documents = a.d.offsets ? a.d.n : (a.own ? a.n_q : 1) * a.n_c;
    if (documents) launch(lengths, blocks(documents, THREADS / 32), THREADS, 0, stream, f, documents);
}

void launch_sum(const Forward &f, Stream stream) {
    const int64_t n = f.a.n_q * f.a.n_c;
    launch(sum_parts, blocks(n, THREADS), THREADS, 0, stream, f.work.partial,
           f.a.scores, n, f.plan.chunks);
}

}  // namespace latemax
