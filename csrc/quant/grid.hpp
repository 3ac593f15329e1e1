// The grid of an IQ1, IQ2 or IQ3 type, as kernels read it. Free of the C++ standard library: kernels include it.
#pragma once
#include <stdint.h>

namespace pgs {

// A point is `axes` values 2 * code + 1; packed, its codes are `bits` bits each, the first axis lowest: 8 axes of 2 bits
// (codes 0 to 2) for IQ1 and IQ2, 4 axes of 3 bits (codes 0 to 7) for IQ3.
struct Grid {
    int points, axes, bits;
    const uint16_t* codes;  // packed codes of each point
    // By packed codes: the number of the point, or -1 - start where the codes are not on the grid: lists[start] is the
    // number of its nearest points, which follow in ggml's order.
    const int32_t* map;
    const uint16_t* lists;
    // `lists` with codes in place of the numbers of points: packed, but on 4 axes 4 bits apart, with bit 3 set for the odd
    // axes, which suits look-ups in tables for two axes. 64 more entries may be read.
    const uint16_t* list_codes;
};

}  // namespace pgs
