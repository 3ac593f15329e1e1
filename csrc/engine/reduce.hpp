// Sums over the rows of a tensor, without an output file.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "engine/tiles.hpp"

namespace pgs {

// Streamed statistics of rows, in float64, with a fixed order of sums: for each group of rows_per_group consecutive rows
// [sum |w|, sum w^2]. `result` is groups x 2. weights: empty, or groups x row_elements: then the second is sum weight w^2.
std::vector<double> reduce_rows(const std::vector<std::shared_ptr<Source>>& sources, const Job& job,
                                std::uint64_t rows_per_group, const std::vector<double>& weights,
                                const RunOptions& options, Cancel& cancel,
                                const std::function<void(std::uint64_t, std::uint64_t)>& poll);

}  // namespace pgs
