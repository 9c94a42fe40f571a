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

/* How many parts a query of l_q tokens is cut into: with more than one the caller gives Workspace::partial. */
int parts(int64_t l_q, int device, int capability);

/* CUDA versions as 1000 * major + 10 * minor: the driver's, 0 without one, and of the runtime linked in. A driver serves
 * runtimes up to its own major version. */
struct Versions {
    int driver, runtime;
};
Versions versions();

}  // namespace latemax
