/* One function for each architecture's file and for what they share. */
#pragma once

#include "runtime.h"
#include "walk.h"

namespace latemax {

/* Load every kernel of the file on the current device, see prepare of runtime.h. */
void prepare_sm80(const Device &device);
void prepare_sm90(const Device &device);
void prepare_shared(const Device &device);

Plan plan_sm80(const maxsim_args &a, const Device &device);
Plan plan_sm90(const maxsim_args &a, const Device &device);
void launch_sm80(const Forward &f, const Device &device, Stream stream);
void launch_sm90(const Forward &f, const Device &device, Stream stream);

/* With normalize: what makes every token of q a unit vector, and of d where the kernel does not take it from its tiles. */
void launch_norms(const Forward &f, Stream stream);
/* d_lengths of masked documents. */
void launch_lengths(const Forward &f, Stream stream);
/* The segments of ragged queries. */
void launch_units(const Forward &f, Stream stream);
/* Scores and argmax of the documents that thread blocks shared. */
void launch_pieces(const Forward &f, Stream stream);
/* scores = the sum of the partial ones, in order. */
void launch_sum(const Forward &f, Stream stream);

/* Calls `run` with dtype and argmax as types: with every combination, or with the call's. */
template <class Run>
void with_all_types(const Run &run) {
    run.template operator()<F16, false>();
    run.template operator()<F16, true>();
    run.template operator()<BF16, false>();
    run.template operator()<BF16, true>();
    run.template operator()<I8, false>();
    run.template operator()<I8, true>();
}
template <class Run>
void with_types(const maxsim_args &a, const Run &run) {
    const auto flag = [&](auto type) {
        if (a.argmax) run.template operator()<decltype(type), true>();
        else run.template operator()<decltype(type), false>();
    };
    if (a.q.dtype == MAXSIM_I8) flag(I8{});
    else if (a.q.dtype == MAXSIM_BF16) flag(BF16{});
    else flag(F16{});
}

}  // namespace latemax
