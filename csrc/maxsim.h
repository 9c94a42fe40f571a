/* The interface between native MaxSim kernels and their callers: raw pointers, sizes and element strides.
 *
 *     scores[a, c] = sum over valid i of  weight[a, i]  max over valid j of  <q[a, i], d[a, c, j]>
 *
 * with query a < n_q, candidate c < n_c, query token i, document token j. Plain C, so that a kernel includes neither
 * torch nor Python: a binding checks the arguments, allocates the outputs, finds the stream and fills this in.
 *
 * Which document is candidate c of query a:
 *
 *     all pairs           own = 0                     document c; all queries share the documents
 *     own candidates      own = 1, d [n_q, n_c, l, dim]
 *     pairs               own = 1, n_c = 1
 *     ragged documents    d.offsets                   document c holds rows d.offsets[c] .. d.offsets[c + 1]
 *     rerank in place     d.offsets, candidates, own = 1   document candidates[a, c]; -1: none
 *     separate documents  d.offsets, d.separate   each is at an address of its own
 *     query numbers       candidates, query_ids   row a belongs to query query_ids[a]; n_q counts rows, q.n queries
 *
 * Ragged queries (q.offsets), separate or not, combine with each of these.
 */
#ifndef LATEMAX_MAXSIM_H
#define LATEMAX_MAXSIM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The last two are codes: int8 [.., dim], and bits [.., ceil(dim / 8)], the most significant first, 1 for +1 and 0 for -1.
 * The CPU forward pass takes them as documents, and as queries of documents of the same codes; the CUDA forward pass takes int8
 * documents and queries. */
typedef enum { MAXSIM_F16 = 0, MAXSIM_BF16 = 1, MAXSIM_F32 = 2, MAXSIM_I8 = 3, MAXSIM_BITS = 4 } maxsim_dtype;

/* One item of a side whose items are separate in memory. Its dims are contiguous, and so is its mask. */
typedef struct {
    const void *tokens;  /* [l_i, dim] */
    const uint8_t *mask; /* as maxsim_side.mask */
    int64_t stride_l;
} maxsim_item;

/* One side: the queries, or the documents. Strides count elements and may be 0 (an expanded view). */
typedef struct {
    const void *tokens; /* [n, l, dim], own candidates [n_q, n, l, dim], or with offsets [total, dim] */
    maxsim_dtype dtype;
    int64_t stride_q; /* of the query axis of own candidates, else 0 */
    int64_t stride_n, stride_l, stride_k;
    /* Ragged items: int64 [n + 1], starting at 0, never falling, ending within the `total` rows. NULL: dense. */
    const int64_t *offsets;
    /* [n], only with offsets, which then give lengths only; `tokens` and `mask` are not read. NULL: items are
     * concatenated. The CPU forward pass takes it; the other kernels need NULL. */
    const maxsim_item *separate;
    int64_t n;     /* items: queries; documents that a query can name */
    int64_t l;     /* tokens of an item; with offsets not read */
    int64_t total; /* token rows of all items */
    /* One byte a token, nonzero = keep; NULL keeps all. The values of a masked token never reach a result. */
    const uint8_t *mask; /* the leading shape of `tokens` */
    int64_t mask_stride_q, mask_stride_n, mask_stride_l;
    /* Of codes, else NULL: the factor of each token, contiguous, the leading shape of `tokens`; of separate items all,
     * concatenated. error: at least the L2 distance between a token and scale * code; NULL: 0. Only bounds read it. */
    const float *scale, *error;
    int64_t scale_stride_q; /* of the query axis of own candidates, else 0 */
} maxsim_side;

typedef struct {
    maxsim_side q, d; /* the CUDA kernels need one dtype for both */
    /* [n_q, n_c] contiguous document numbers, -1 for an empty slot, or NULL. Needs d.offsets. */
    const int64_t *candidates;
    /* [n_q], from 0 to q.n - 1, or NULL: row a of candidates and outputs is of query a. Needs candidates; q.l is then the
     * longest query also with q.offsets. The CPU forward pass takes it; the other kernels need NULL. */
    const int64_t *query_ids;
    /* Nonzero: every query has its own documents, so that queries cannot share a tile. */
    int32_t own;
    int64_t n_q, n_c, dim;

    /* Outputs, contiguous. */
    float *scores;   /* [n_q, n_c] */
    int32_t *argmax; /* [n_q, n_c, q.l], or with q.offsets and no query_ids [n_c, q.total]; NULL unless wanted. The index of
                      * the best token in its document, the lowest on ties; -1 for a masked i or no valid j, and after the
                      * end of a query. */

    /* The score of a document without a valid token against a query with one. */
    double empty_score;
    /* Nonzero: tokens are divided by max(their L2 norm, 1e-12), computed in float32. */
    int32_t normalize;
    /* Contiguous, the leading shape of q.tokens; NULL: all 1. Those of masked tokens are not read in the forward pass. */
    const float *weights;
    /* Nonzero: the forward pass divides sums by the number of valid query tokens. The CUDA kernels take neither. */
    int32_t mean;
    /* [n_q, n_c] contiguous, or NULL. Not NULL, with documents of int8 codes: `scores` and `upper` become bounds of the
     * score of the tokens that the codes were made of; no argmax. coarse: with queries of 8 bits, faster and wider. */
    float *upper;
    int32_t coarse;
} maxsim_args;

#ifdef __cplusplus
}
#endif

#endif /* LATEMAX_MAXSIM_H */
