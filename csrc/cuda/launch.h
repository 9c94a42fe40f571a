/* One function for each architecture's file and for what they share. */
#pragma once

#include "runtime.h"
#include "items.h"

namespace latemax {

/* Fill in f.plan but for plan_queries, and launch. */
void launch_sm80(Forward &f, const Device &device, Stream stream);
void launch_sm90(Forward &f, const Device &device, Stream stream);

/* 1 / max(norm, 1e-12) of every token of q and d. */
void launch_norms(const Forward &f, Stream stream);
/* d_lengths of masked documents. */
void launch_lengths(const Forward &f, Stream stream);
/* scores = the sum of the partial ones, in order. */
void launch_sum(const Forward &f, Stream stream);

/* Calls `run` with the dtype, the columns and whether winners are wanted, as types. */
template <int N, class Run>
void with_argmax(const maxsim_args &a, const Run &run) {
    const auto flag = [&](auto type) {
        if (a.argmax) run.template operator()<decltype(type), N, true>();
        else run.template operator()<decltype(type), N, false>();
    };
    if (a.q.dtype == MAXSIM_BF16) flag(BF16{});
    else flag(F16{});
}

}  // namespace latemax
