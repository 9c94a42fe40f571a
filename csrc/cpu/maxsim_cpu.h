/* The native CPU kernels as a binding sees them. */
#ifndef LATEMAX_MAXSIM_CPU_H
#define LATEMAX_MAXSIM_CPU_H

#include "level.h"

namespace latemax {

/* The levels that this processor and operating system can run, worst first; returns how many. */
int levels(const Level **out);

/* float16, bfloat16 and float32 in any mixture. */
void forward(const maxsim_args &args, const Level &level, int threads);

struct Gradients {
    const float *g; /* [n_q, n_c] */
    int64_t g_stride_q, g_stride_c;
    void *grad_q; /* contiguous, of q's shape and dtype, or NULL */
    void *grad_d; /* contiguous, of d's shape and dtype, or NULL */
};

/* From args.argmax, for tokens whose dim is dense. No masks: what is masked has won nothing. */
void backward(const maxsim_args &args, const Gradients &out, const Level &level, int threads);

}  // namespace latemax

#endif
