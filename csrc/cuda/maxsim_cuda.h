/* What csrc/binding_cuda.cpp calls. Errors are exceptions (std::runtime_error). */
#pragma once

#include <stdint.h>

#include "../maxsim.h"

namespace latemax {

/* Scratch memory of a call, cut from one allocation; each is NULL where it is not needed. */
struct Workspace {
    float *q_inverse_norms, *d_inverse_norms; /* with normalize: a float a token, in the order of the masks' shapes */
    int32_t *d_lengths; /* with d.mask: documents' lengths up to their last kept token; [n_c], with own [n_q, n_c], or [d.n] */
    int32_t *units;     /* of ragged queries: the number of each one's first segment; [n_q + 1] */
    float *partial;     /* sums of the segments of long or ragged queries: [segments, n_c] */
    float *piece_values; /* maxima of documents that two thread blocks share, see walk.h: [2 * grid, rows] */
    int32_t *piece_wheres; /* with argmax */
};

/* The bytes of scratch memory that a call needs, at a multiple of 16 bytes. `capability` 0 selects the kernel for the
 * device; 80 or 90 select that architecture's kernel. Of ragged queries q.l is not read. */
int64_t scratch_bytes(const maxsim_args &args, int device, int capability);

/* Launches the forward on a stream of a device. */
void forward(const maxsim_args &args, void *scratch, int device, void *stream, int capability);

/* CUDA versions as 1000 * major + 10 * minor: the driver's, 0 without one, and of the runtime linked in. A driver serves
 * runtimes up to its own major version. */
struct Versions {
    int driver, runtime;
};
Versions versions();

}  // namespace latemax
