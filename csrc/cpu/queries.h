/* Query tokens as the micro-kernel reads them: valid tokens only, transposed to [dim][lanes]. */
#ifndef LATEMAX_CPU_QUERIES_H
#define LATEMAX_CPU_QUERIES_H

#include <vector>

#include "rows.h"

namespace latemax {

/* Consecutive query rows that one unit of work scores against its documents. */
struct Part {
    int64_t query_first, query_end;
    int64_t row_first, row_end; /* of Queries::token */
    int64_t vector_first;        /* start of its panel, in vectors of lanes */
    int64_t vectors;
};

class Queries {
  public:
    Queries(const maxsim_args &args, const Level &level, Form form);

    int64_t rows() const { return row_begin.back(); }
    /* Cuts the rows at every query (`each`), else into about `wanted` parts of equally many rows; `split` allows cuts
     * inside a query. */
    void cut(bool each, int64_t wanted, bool split);
    void pack(int threads);
    /* The number of vectors that the micro-kernel takes at once, starting with this one. */
    int block(const Part &part, int64_t vector) const {
        const int64_t left = part.vectors - vector;
        return left >= level_.block ? level_.block : left >= 2 ? 2 : 1;
    }
    const char *panel(const Part &part, int64_t vector) const {
        return panel_ + (part.vector_first + vector) * height_ * level_.lanes * 4;
    }
    /* The last step of the panel: with bounds, the factors of radii. */
    const float *last(const Part &part, int64_t vector) const {
        const int64_t before = (height_ - 1) * block(part, vector) * level_.lanes * 4;
        return reinterpret_cast<const float *>(panel(part, vector) + before);
    }

    std::vector<int64_t> row_begin; /* [n_q + 1] */
    std::vector<int32_t> token;     /* [rows] the number of the token in its query */
    std::vector<double> scale;      /* [rows] the factor still to apply to the maximum, or empty */
    std::vector<double> error;      /* [rows] bounds: the error of the row in the panel, relative to its norm; or empty */
    std::vector<char> infinite;     /* [rows] the row holds infinities, and the panel zeros; or empty */
    std::vector<Part> parts;

  private:
    void add(int64_t query_first, int64_t query_end, int64_t row_first, int64_t row_end);
    void pack_row(int64_t query, int64_t row, char *out, int64_t stride, float *wide);

    const maxsim_args &args_;
    const Level &level_;
    const Form form_;
    const int64_t height_; /* vectors of a panel */
    Buffer<char> own_;
    char *panel_ = nullptr;
    int64_t vectors_ = 0;
};

}  // namespace latemax

#endif
