// Which blocks the lanes of a vector hold.
#pragma once
#include "quant/lanes/kernels.hpp"
#include "quant/lanes/vector.hpp"

namespace pgs::lanes::PGS_SET {

// One block per lane: blocks follow each other through all rows, so that short rows fill the lanes too. Lanes beyond the
// last block repeat it and store the same bytes again.
struct Group {
    const float* values[W];
    const float* importance[W];  // only if there is importance
    uint64_t row[W];             // the same
    unsigned char* target[W];
};

// Numbers at, at + 1, ... of each lane's block: columns[i] has those at + i. n is a multiple of 16.
LANE void load_values(const Group& group, int at, int n, vf* columns) {
    const float* rows[W];
    for (int j = 0; j < W; ++j) rows[j] = group.values[j] + at;
    load_columns(rows, n, columns);
}
LANE void load_importance(const Group& group, int at, int n, vf* columns) {
    const float* rows[W];
    for (int j = 0; j < W; ++j) rows[j] = group.importance[j] + at;
    load_columns(rows, n, columns);
}

// ggml's weights of numbers x: importance * sqrt(sigma2 + x^2).
LANE void load_weights(const Group& group, int at, int n, const vf* x, vf sigma2, vf* w) {
    load_importance(group, at, n, w);
    for (int i = 0; i < n; ++i) w[i] = w[i] * square_root(sigma2 + x[i] * x[i]);
}

// Calls work(group) for all blocks of `elements` elements, `bytes` bytes.
template <class Work>
LANE void for_groups(const Rows& rows, uint32_t elements, uint32_t bytes, Work work) {
    const uint64_t per_row = rows.row_elements / elements, blocks = rows.rows * per_row;
    for (uint64_t block = 0; block < blocks; block += W) {
        Group group;
        for (int j = 0; j < W; ++j) {
            const uint64_t at = block + j < blocks ? block + j : blocks - 1;
            group.values[j] = rows.values + at * elements;
            if (rows.importance) {
                group.row[j] = at / per_row;
                group.importance[j] = rows.importance + at % per_row * elements;
            }
            group.target[j] = rows.target + at * bytes;
        }
        work(group);
    }
}

}  // namespace pgs::lanes::PGS_SET
