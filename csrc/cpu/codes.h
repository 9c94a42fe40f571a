/* Tokens that are codes: what a call multiplies, and its query tokens. code_kernel.h has the loops. */
#ifndef LATEMAX_CPU_CODES_H
#define LATEMAX_CPU_CODES_H

#include "queries.h"

namespace latemax {

Form form_of(const maxsim_args &args, const Level &level);

/* Dims of a row of this form. Bits that become 16-bit numbers fill whole bytes. */
inline int64_t row_dims(const maxsim_args &args, Form form) {
    return form == I16 && args.d.dtype == MAXSIM_BITS ? (args.dim + 7) / 8 * 8 : args.dim;
}

/* Whether rows are read before they are multiplied: rewritten, or for their norms. */
inline bool read_first(const maxsim_args &args, Form form, bool rewritten) {
    return rewritten || (form == I8 && (args.normalize || args.upper));
}

/* 4-byte steps of a lane of the panel, and what follows them. */
inline int64_t panel_height(const maxsim_args &args, Form form) {
    const int64_t steps = steps_of(form, row_dims(args, form));
    return steps + extra_of(form, steps);
}

struct CodeToken {
    double scale;  /* of its maxima; NaN if it holds NaN */
    double error;  /* bounds: of the panel, relative to its norm */
    bool infinite; /* it holds infinities, or is the zero vector in one-bit codes */
};

/* Writes one query token, [height] at a distance of `stride` lanes. wide: scratch for dim floats. */
CodeToken pack_codes(const maxsim_args &args, const Level &level, Form form, int64_t query, int64_t token, char *out,
                     int64_t stride, float *wide);

/* The maximum for a query token that is `infinite`, by plain loops over a document with a valid token. */
void infinite_maximum(const maxsim_args &args, const Level &level, int64_t query, int64_t token, const Item &document,
                      int64_t length, float *best, int32_t *at);

/* Bounds of a score from those of the maxima of query `query`, rounded outwards. */
void sum_bounds(const maxsim_args &args, const Queries &queries, int64_t query, const float *lower, const float *upper,
                float *score_lower, float *score_upper);

/* Finds factors and radii of the rows, in rows.scale and rows.radius, and rewrites them to `to`, unless NULL. */
void read_codes(const maxsim_args &args, const Level &level, Form form, const Item &document, float query_error, char *to,
                Rows &rows);

}  // namespace latemax

#endif
