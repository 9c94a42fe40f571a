/* The interface of the native CPU kernels to a binding. */
#ifndef LATEMAX_MAXSIM_CPU_H
#define LATEMAX_MAXSIM_CPU_H

#include "level.h"

namespace latemax {

/* Lists the levels that this processor and operating system can run, slowest first; returns their number. */
int levels(const Level **out);

/* q and d may each be float16, bfloat16 or float32. */
void forward(const maxsim_args &args, const Level &level, int threads);

struct Gradients {
    const float *g; /* [n_q, n_c] */
    int64_t g_stride_q, g_stride_c;
    void *grad_q; /* contiguous, shape and dtype of q, or NULL */
    void *grad_d; /* contiguous, shape and dtype of d, or NULL */
    float *grad_weights; /* contiguous, shape of args.weights, or NULL */
};

/* Gradients from args.argmax. Tokens must have stride 1 along dim. Needs no masks: argmax names no masked token. args.mean
 * is not looked at: g is that of the sums. */
void backward(const maxsim_args &args, const Gradients &out, const Level &level, int threads);

struct FloatRows {
    const char *rows; /* [n, l, dim], dims contiguous */
    int64_t size;     /* bytes of a number: 2, 4 or 8, with the sign first */
    int64_t n, l, dim;
    int64_t stride_n, stride_l;
};

/* Writes to out [n, l] whether a row is not all zeros, 0 or 1; returns whether that is every row. */
bool nonzero_rows(const FloatRows &x, uint8_t *out, int threads);

}  // namespace latemax

#endif
