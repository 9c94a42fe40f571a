/* What csrc/binding_cuda.cpp calls. Errors are exceptions (std::runtime_error). */
#pragma once

#include <stdint.h>

#include "../maxsim.h"

namespace latemax {

/* Scratch memory of a call, allocated by the caller; each is NULL where it is not needed. */
struct Workspace {
    float *q_inverse_norms, *d_inverse_norms; /* with normalize: a float a token, in the order of the masks' shapes */
    int32_t *d_lengths; /* with d.mask: documents' lengths up to their last kept token; [n_c], with own [n_q, n_c], or [d.n] */
    float *partial;     /* sums of a long query's parts: [parts, n_q, n_c] */
};

/* Launches the forward on a stream of a device. `capability` 0 selects the kernel for the device; 80 or 90 select that
 * architecture's kernel. */
void forward(const maxsim_args &args, const Workspace &work, int device, void *stream, int capability);

/* What a backward is given next to a.q, a.d, a.candidates, a.own, a.argmax and a.normalize, and what it fills. */
struct Gradient {
    const float *scores; /* gradient of the scores [n_q, n_c], any strides, in elements */
    int64_t stride_q, stride_c;
    /* With candidates and d: the numbers query * n_c + candidate of all pairs in the order of their documents, equal ones in
     * their own, and where those of each document start, [d.n + 1]. */
    const int64_t *pairs, *pair_starts;
    void *q, *d;  /* contiguous gradients in the dtype of the tokens, every row written; NULL unless wanted */
    float *parts; /* [splits, n_q * q.l, dim], with q and more than one split */
};

/* Launches the backward from the recorded argmax. Queries of one length, dim a multiple of 8 up to 1024, rows of tokens at
 * multiples of 16 bytes. */
void backward(const maxsim_args &args, const Gradient &gradient, int device, void *stream);

/* Into how many parts the sums of `rows` query tokens over n_c documents are cut. */
int splits(int64_t rows, int64_t n_c, int device);

/* How many parts a query of l_q tokens is cut into: with more than one the caller gives Workspace::partial. */
int parts(int64_t l_q, int device, int capability);

/* CUDA versions as 1000 * major + 10 * minor: the driver's, 0 without one, and of the runtime linked in. A driver serves
 * runtimes up to its own major version. */
struct Versions {
    int driver, runtime;
};
Versions versions();

}  // namespace latemax
