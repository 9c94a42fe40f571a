/* What csrc/binding_cuda.cpp calls. Errors are exceptions (std::runtime_error). */
#pragma once

#include <stdint.h>

#include "../maxsim.h"

namespace latemax {

/* Puts the forward on a stream of a device; `capability` 0 takes the kernel of the device, 80 or 90 that of another. */
void forward(const maxsim_args &args, int device, void *stream, int capability);

/* How many parts a query of l_q tokens is cut into: with more than one the caller gives maxsim_args.partial. */
int parts(int64_t l_q, int device, int capability);

}  // namespace latemax
