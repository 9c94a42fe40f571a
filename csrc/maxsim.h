/* The one interface between native MaxSim kernels and what calls them: raw pointers, sizes and element strides.
 *
 *     scores[a, c] = sum over valid i of  max over valid j of  <q[a, i], d[a, c, j]>
 *
 * with query a < n_q, candidate c < n_c, query token i < l_q, document token j < l_d. Plain C, so that a kernel includes
 * neither torch nor Python: a binding checks the arguments, allocates the outputs, finds the stream, and fills this in.
 *
 * Where candidate c of query a lies:
 *
 *     all pairs             d_stride_q = 0                          documents shared by all queries
 *     own candidates        d_stride_q = n_c * l_d * dim            (dense) a [n_q, n_c, l_d, dim] tensor
 *     pairs                 n_c = 1, d_stride_q = l_d * dim         (dense) query a against document a
 *     ragged documents      d_offsets set                           document c holds rows d_offsets[c] .. d_offsets[c + 1]
 *     rerank in place       d_offsets and candidates set            as above for document candidates[a, c]; -1: none
 *
 * Ragged queries (q_offsets) go with any of these.
 * The CUDA kernels need room to work in, given by the caller.
 */
#ifndef LATEMAX_MAXSIM_H
#define LATEMAX_MAXSIM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { MAXSIM_F16 = 0, MAXSIM_BF16 = 1, MAXSIM_F32 = 2, MAXSIM_F64 = 3 } maxsim_dtype;

typedef struct {
    /* Tokens. Strides count elements and may be 0 (an expanded view); stride_k, of dim, is 1 where rows are dense. */
    const void *q; /* [n_q, l_q, dim], or with q_offsets [t_q, dim] */
    const void *d; /* see above; with d_offsets [t_d, dim] */
    int64_t q_stride_n, q_stride_l, q_stride_k;
    int64_t d_stride_q, d_stride_n, d_stride_l, d_stride_k;

    /* Where rows are ragged, else NULL: [n_q + 1] and [n_documents + 1], starting at 0, never falling, and ending within
     * the t_q and t_d tokens. */
    const int64_t *q_offsets;
    const int64_t *d_offsets;
    /* [n_q, n_c] contiguous document numbers, or NULL. Needs d_offsets. */
    const int64_t *candidates;

    /* One byte a token, nonzero = keep; NULL keeps all. What a masked token holds is never read into a result. */
    const uint8_t *q_mask; /* [n_q, l_q], or with q_offsets [t_q] */
    const uint8_t *d_mask; /* the documents' leading shape, or with d_offsets [t_d] */
    int64_t q_mask_stride_n, q_mask_stride_l;
    int64_t d_mask_stride_q, d_mask_stride_n, d_mask_stride_l;

    /* Outputs, contiguous. scores is float, or double where a dtype is MAXSIM_F64. */
    void *scores;    /* [n_q, n_c] */
    int32_t *argmax; /* [n_q, n_c, l_q], or with q_offsets [n_c, t_q]; NULL unless asked for: the winner's number in its
                      * document, lowest among equals, -1 for a masked i or no valid j */

    int64_t n_q, n_c;
    int64_t n_documents; /* with d_offsets */
    int64_t l_q, l_d; /* with offsets all of them: t_q, t_d */
    int64_t dim;
    maxsim_dtype q_dtype, d_dtype; /* the CUDA kernels want them alike */

    /* The score of a document without a valid token against a query with one. */
    double empty_score;
    /* Nonzero: tokens are divided by max(their L2 norm, 1e-12), taken in float32. */
    int32_t normalize;
    /* Nonzero: float32 products may be rounded to TF32. */
    int32_t allow_tf32;

    /* CUDA only. Nonzero: every query has its own documents, so that queries cannot share a tile. */
    int32_t own;
    /* CUDA only, room for inverse norms where normalize is set: a float a token, in the order of the masks' shapes. */
    float *q_inverse_norms; /* [n_q, l_q] or [t_q] */
    float *d_inverse_norms; /* [n_c, l_d], with own [n_q, n_c, l_d], or [t_d] */
    int64_t q_tokens, d_tokens;
    /* CUDA only, room for the documents' lengths up to their last kept token where d_mask is set, else NULL. */
    int32_t *d_lengths; /* [n_c], with own [n_q, n_c], or [n_documents] */
    /* CUDA only, room for the sums of a long query's parts: [parts, n_q, n_c], NULL where a query has one part. */
    float *partial;
} maxsim_args;

#ifdef __cplusplus
}
#endif

#endif /* LATEMAX_MAXSIM_H */
