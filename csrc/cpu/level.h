/* The functions of one instruction-set level. Each level_*.cpp defines one from the templates of kernel.h. */
#ifndef LATEMAX_CPU_LEVEL_H
#define LATEMAX_CPU_LEVEL_H

#include <cstdint>

#include "../maxsim.h"

namespace latemax {

constexpr float EPS = 1e-12f;

/* Valid tokens of one document, or of part of one, as the micro-kernel reads them. */
struct Rows {
    const char *base;        /* float32, or bfloat16 for Level::run_bf16 */
    int64_t stride;          /* bytes between rows */
    const int32_t *gather;   /* row indices, or NULL: 0 .. count */
    const int32_t *number;   /* the token number of each row, or NULL: first, first + 1, ... */
    const char *prefetch;    /* memory to prefetch while these rows are multiplied; NULL: the following rows */
    int64_t prefetch_stride; /* bytes of it to prefetch per row */
    char *scratch;           /* scratch for 32 bfloat16 rows of dim + 32 elements, or NULL */
    float *scale;            /* 1 / max(norm, EPS) of each row, which multiplies its similarities; or NULL */
    int64_t first, count;
    bool dense;              /* rows are contiguous, so the hardware prefetcher helps: fetch line after line */
    bool compute_scale;      /* compute scale first, while the rows are in cache */
};

/* Updates the running maxima of 1, 2 or Level::block vectors of query tokens over the rows: best and, unless NULL, at,
 * the token number of the best. panel is [dim][vectors * lanes], for bfloat16 [ceil(dim / 2)][vectors * lanes][2]. */
using Run = void (*)(const void *panel, int vectors, const Rows &rows, int64_t dim, float *best, int32_t *at);

struct Level {
    const char *name;
    int lanes;
    int block; /* the most vectors that one run takes */
    Run run_f32;
    Run run_bf16; /* NULL: bfloat16 rows are widened and use run_f32 */
    /* converts n contiguous elements to float32 */
    void (*widen)(maxsim_dtype from, const void *x, int64_t n, float *out);
    float (*sum_of_squares)(maxsim_dtype of, const void *x, int64_t n);
    /* y += a x */
    void (*add_scaled)(maxsim_dtype of, float a, const void *x, int64_t n, float *y);
};

extern const Level level_portable;
#if defined(__x86_64__)
extern const Level level_avx2, level_avx512, level_avx512_bf16;
#endif
#if defined(__x86_64__) && defined(__linux__)
extern const Level *const level_amx_bf16; /* NULL if the compiler lacks the AMX intrinsics */
#endif

}  // namespace latemax

#endif
