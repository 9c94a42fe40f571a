/* What csrc/binding_cuda.cpp calls. Errors are exceptions (std::runtime_error). */
#pragma once

#include <stdint.h>

#include "../maxsim.h"

namespace latemax {

/* Puts the forward on a stream of a device; `capability` 0 takes the kernel of the device, 80 or 90 that of another. */
void forward(const maxsim_args &args, int device, void *stream, int capability);

/* How many parts a query of l_q tokens is cut into: with more than one the caller gives maxsim_args.partial. */
int parts(int64_t l_q, int device, int capability);

/* Loads the kernels of a device, which the first forward would do. */
void load(int device, int capability);

/* CUDA versions as 1000 * major + 10 * minor: the driver's, 0 without one, and of the runtime linked in. A driver serves
 * runtimes up to its own major version. */
struct Versions {
    int driver, runtime;
};
Versions versions();

}  // namespace latemax
