// The grids of the IQ types, which ggml searches for once, when a type is first encoded.
#pragma once
#include <cstdint>

namespace pgs {

// Makes the grid of a type, if it needs one and none is there. Called on a thread of parallel_for it stops soon after a
// cancel, with Error(cancelled); the next call starts anew.
void make_grid(std::int32_t type);

}  // namespace pgs
