// Whole arrays of rows to a type and back, on threads.
#pragma once
#include <cstdint>
#include <functional>
#include <span>

#include "base/parallel.hpp"
#include "quant/types.hpp"

namespace pgs {

// Rows of `row_elements` each, which must be whole blocks.
struct RowsOf {
    std::uint64_t rows, row_elements;
};

// `importance` is empty, or holds groups x row_elements values: rows / groups consecutive rows share one. Error(bad_plan)
// for an importance that does not fit or that check_importance refuses; a type that ignores importance ignores it.
// `target` holds rows * row_bytes bytes. threads: see thread_count. poll: see parallel_for.
void quantize_rows(const TypeFacts& type, RowsOf shape, const float* source, std::span<const float> importance,
                   std::byte* target, bool best, int threads, Cancel& cancel, const std::function<void()>& poll);

void dequantize_rows(const TypeFacts& type, RowsOf shape, const std::byte* source, float* target, int threads,
                     Cancel& cancel, const std::function<void()>& poll);

}  // namespace pgs
