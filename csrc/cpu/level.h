/* The functions of one instruction-set level. Each level_*.cpp defines one from the templates of kernel.h. */
#ifndef LATEMAX_CPU_LEVEL_H
#define LATEMAX_CPU_LEVEL_H

#include <cstdint>

#include "../maxsim.h"

namespace latemax {

constexpr float EPS = 1e-12f;

/* What a row and a lane of the panel hold: 4 bytes are one step. Codes are rewritten to one of the last three.
 *
 *     I16   2 dims: int8 codes, or bits as +1 and -1, by query tokens of 16 bits
 *     I8    4 dims: int8 codes + Bytes::offset, by query tokens of 8 bits
 *     BITS  32 dims */
enum Form { F32, BF16, I16, I8, BITS };
/* The steps of I16 whose sums fit in 32 bits: 256 x 32767 x 127 < 2^31. Query tokens have a factor for each. */
constexpr int64_t I16_STEPS = 128;
/* Sums of squared int8 codes fit in 32 bits. */
constexpr int64_t MOST_CODE_DIMS = 1 << 17;

inline int64_t steps_of(Form form, int64_t dim) {
    const int64_t dims = form == F32 ? 1 : form == I8 ? 4 : form == BITS ? 32 : 2;
    return (dim + dims - 1) / dims;
}
/* Vectors of a panel after its steps: of I16 the factors of each I16_STEPS, of I8 what sums start at; then of both the
 * factor of Rows::radius. */
inline int64_t extra_of(Form form, int64_t steps) {
    return form == I16 ? (steps + I16_STEPS - 1) / I16_STEPS + 1 : form == I8 ? 2 : 0;
}

/* Valid tokens of one document, or of part of one, as the micro-kernel reads them. */
struct Rows {
    const char *base;        /* float32, or bfloat16 for Level::run_bf16, or codes */
    int64_t stride;          /* bytes between rows */
    const int32_t *gather;   /* row indices, or NULL: 0 .. count */
    const int32_t *number;   /* the token number of each row, or NULL: first, first + 1, ... */
    const char *prefetch;    /* memory to prefetch while these rows are multiplied; NULL: the following rows */
    int64_t prefetch_stride; /* bytes of it to prefetch per row */
    char *scratch;           /* for rows in place: room for 32 rows, each with 64 bytes more */
    float *scale;            /* 1 / max(norm, EPS) of each row, which multiplies its similarities; or NULL */
    int64_t first, count;
    bool dense;              /* rows are contiguous, so the hardware prefetcher helps: fetch line after line */
    bool compute_scale;      /* compute scale first, while the rows are in cache */
    float *radius;           /* bounds of codes: the distance between a row and its code */
};

/* Updates the running maxima of 1, 2 or Level::block vectors of query tokens over the rows: best and, unless NULL, at,
 * the token number of the best. panel is [dim][vectors * lanes], for bfloat16 [ceil(dim / 2)][vectors * lanes][2]. */
using Run = void (*)(const void *panel, int vectors, const Rows &rows, int64_t dim, float *best, int32_t *at);

/* The same for lower and upper bounds of the similarities, which are within `factor` of the query tokens times
 * Rows::radius. */
using Bounds = void (*)(const void *panel, int vectors, const Rows &rows, int64_t dim, float *lower, float *upper,
                        const float *factor);

/* Rows of codes, and the form they are rewritten to. */
struct Codes {
    maxsim_dtype from;
    Form form;
    const char *base;
    int64_t stride;
    const int32_t *gather;
    int64_t count, dim; /* dim of I16 made of bits: rounded up to 8 */
    char *to;           /* [count][4 * steps], or NULL: the rows have this form already */
    bool normalize;
    float norm_of_bits;
    float *scale;  /* [count], padded to lanes; becomes the factor of a row's similarities */
    float *radius; /* NULL, or likewise the error of a row; becomes Rows::radius */
    /* for radius, relative to the norm of a query token: the largest error of its own code, and that of the products */
    float query_error, rounding;
};

/* Products of bytes, form I8. */
struct Bytes {
    Run run; /* NULL: form I16 is used */
    Bounds bounds;
    int most;   /* the largest number of a query token: 127, or 63 where pairs are summed in 16 bits */
    int offset; /* what is added to the codes of rows: 128 for instructions that take them without a sign, else 0 */
};

struct CodeLevel {
    Run i16, bits;
    Bounds bounds_i16;
    Bytes i8;
    void (*rewrite)(const Codes &codes);
};

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
    const CodeLevel *codes;
};

extern const CodeLevel codes_portable;
#if defined(__x86_64__)
extern const CodeLevel codes_avx2, codes_avx512, codes_avx512_vnni;
#endif

extern const Level level_portable;
#if defined(__x86_64__)
extern const Level level_avx2, level_avx512, level_avx512_vnni, level_avx512_bf16;
#endif
#if defined(__x86_64__) && defined(__linux__)
/* NULL if the compiler lacks the AMX intrinsics */
extern const Level *const level_amx_bf16;
extern const Bytes *const bytes_amx_int8;
#endif

}  // namespace latemax

#endif
