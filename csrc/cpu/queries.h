/* Query tokens as the micro-kernel reads them: valid ones only, side by side, [dim][lanes]. */
#ifndef LATEMAX_CPU_QUERIES_H
#define LATEMAX_CPU_QUERIES_H

#include <vector>

#include "rows.h"

namespace latemax {

/* A run of consecutive query rows that one unit of work takes against its documents. */
struct Part {
    int64_t query_first, query_past;
    int64_t row_first, row_past; /* of Queries::token */
    int64_t vector_first;        /* where its panel starts, in vectors of lanes */
    int64_t vectors;
};

class Queries {
  public:
    /* bf16: the panel holds pairs of bfloat16. */
    Queries(const maxsim_args &args, const Level &level, bool bf16);

    int64_t rows() const { return row_begin.back(); }
    /* Cuts the rows: at every query (each), else into about `wanted` parts of as many rows; inside a query too where
     * `split`. */
    void cut(bool each, int64_t wanted, bool split);
    void pack(int threads);
    /* Vectors that the micro-kernel takes at once, from this one on. */
    int block(const Part &part, int64_t vector) const {
        const int64_t left = part.vectors - vector;
        return left >= level_.block ? level_.block : left >= 2 ? 2 : 1;
    }
    const char *panel(const Part &part, int64_t vector) const {
        return panel_ + (part.vector_first + vector) * steps_ * level_.lanes * 4;
    }

    std::vector<int64_t> row_begin; /* [n_q + 1] */
    std::vector<int32_t> token;     /* [rows] which token of its query */
    std::vector<float> scale;       /* [rows] the factor that the panel leaves out, or empty */
    std::vector<Part> parts;

  private:
    void add(int64_t query_first, int64_t query_past, int64_t row_first, int64_t row_past);
    void pack_row(int64_t query, int64_t row, char *out, int64_t stride, float *wide);

    const maxsim_args &args_;
    const Level &level_;
    const bool bf16_;
    const int64_t steps_;
    Buffer<char> own_;
    char *panel_ = nullptr;
    int64_t vectors_ = 0;
};

}  // namespace latemax

#endif
