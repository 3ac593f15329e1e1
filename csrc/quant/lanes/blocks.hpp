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
