// The grids of the IQ types: made on first use, and shared by all kernels.
#pragma once
#include <cstdint>

#include "quant/grid.hpp"

namespace pgs {

bool has_grid(std::int32_t type);

// Null for a type without a grid. Made by the first call for a type; the calling thread's Cancel is heard.
const Grid* grid_of(std::int32_t type);

}  // namespace pgs
