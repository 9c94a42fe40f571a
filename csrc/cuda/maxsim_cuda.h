/* What csrc/binding_cuda.cpp calls. Errors are exceptions (std::runtime_error). */
#pragma once

#include <stdint.h>

#include "../maxsim.h"

namespace latemax {

/* Scratch memory of a call, cut from one allocation; each is NULL where it is not needed. */
struct Workspace {
    /* With normalize: a float a token, in the order of the masks' shapes. They make tokens unit vectors. */
    float *q_norms, *d_norms;
    int32_t *d_lengths; /* with d.mask: documents' lengths up to their last kept token; [n_c], with own [n_q, n_c], or [d.n] */
    int32_t *units;     /* of ragged queries: the number of each one's first segment; [n_q + 1] */
    float *partial;     /* sums of the segments of long or ragged queries: [segments, n_c] */
    float *piece_values; /* maxima of documents that two thread blocks share, see walk.h: [2 * grid, rows] */
    int32_t *piece_wheres; /* with argmax */
};

/* The bytes of scratch memory that a call needs, at a multiple of 16 bytes. `capability` 0 selects the kernel for the
 * device; 80 or 90 select that architecture's kernel. Of ragged queries q.l is not read. */
int64_t scratch_bytes(const maxsim_args &args, int device, int capability);

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

/* Launches the forward on a stream of a device. */
void forward(const maxsim_args &args, void *scratch, int device, void *stream, int capability);

/* CUDA versions as 1000 * major + 10 * minor: the driver's, 0 without one, and of the runtime linked in. A driver serves
 * runtimes up to its own major version. */
struct Versions {
    int driver, runtime;
};
Versions versions();

}  // namespace latemax
