/* What one instruction-set level offers the driver. Every level_*.cpp fills one in from the templates of kernel.h. */
#ifndef LATEMAX_CPU_LEVEL_H
#define LATEMAX_CPU_LEVEL_H

#include <cstdint>

#include "../maxsim.h"

namespace latemax {

constexpr float EPS = 1e-12f;

/* Valid tokens of one document, or of a piece of one, as the micro-kernel reads them. */
struct Rows {
    const char *base;       /* float32, or bfloat16 for Level::run_bf16 */
    int64_t stride;         /* bytes between rows */
    const int32_t *gather;  /* which rows to take, or NULL: 0 .. count */
    const int32_t *number;  /* the token number of every row taken, or NULL: first, first + 1, ... */
    const char *later;      /* what will be read after these rows, to be fetched on the way; NULL: the rows to come */
    int64_t later_stride;   /* bytes of it for every row taken */
    char *room;             /* for 32 rows of bfloat16, each 32 elements longer than dim; or NULL */
    float *scale;           /* 1 / max(norm, EPS) of every row taken: a factor of its similarities; or NULL */
    int64_t first, count;
    bool dense;             /* that lies end to end: the processor's own prefetcher joins in, line after line */
    bool measure;           /* fill scale first, from rows that are about to be used anyway */
};

/* Running maxima of 1, 2 or Level::block vectors of query tokens over the rows: best and, unless NULL, the token number it came from.
 * panel [dim][vectors * lanes], for bfloat16 [ceil(dim / 2)][vectors * lanes][2]. */
using Run = void (*)(const void *panel, int vectors, const Rows &rows, int64_t dim, float *best, int32_t *at);

struct Level {
    const char *name;
    int lanes;
    int block; /* most vectors that a run takes */
    Run run_f32;
    Run run_bf16; /* NULL: bfloat16 rows are widened and go through run_f32 */
    /* n contiguous elements to float32 */
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
extern const Level *const level_amx_bf16; /* NULL where the compiler had no such instructions */
#endif

}  // namespace latemax

#endif
