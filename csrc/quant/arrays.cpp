#include "quant/arrays.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "quant/grids.hpp"
#include "quant/rows.hpp"

namespace pgs {

namespace {

// Calls work(first, count) for all rows, a chunk at a time, on threads; a single chunk on this one, unless it may have to
// wait for a grid.
template <typename Work>
void over_rows(const TypeFacts& type, RowsOf shape, int threads, Cancel& cancel, const std::function<void()>& poll,
               Work work) {
    const std::uint64_t rows = shape.rows, chunk = chunk_rows(shape.row_elements);
    threads = thread_count(threads);
    if (rows <= chunk && !has_grid(type.id)) return do_here([&] { work(0, rows); });
    parallel_for(
        threads, (rows + chunk - 1) / chunk, cancel,
        [&](int, std::uint64_t i) { work(i * chunk, std::min(chunk, rows - i * chunk)); }, poll);
}

}  // namespace

void quantize_rows(const TypeFacts& type, RowsOf shape, const float* source, std::span<const float> importance,
                   std::byte* target, bool best, int threads, Cancel& cancel, const std::function<void()>& poll) {
    const std::uint64_t k = shape.row_elements, bytes = row_bytes(type, k);
    std::uint64_t per_importance = 0;  // rows that share an importance row
    if (!importance.empty() && (type.uses_importance || (best && type.has_best))) {
        const std::uint64_t groups = k ? importance.size() / k : 0;
        if (groups == 0 || groups * k != importance.size() || shape.rows % groups)
            throw Error(Kind::bad_plan, "importance does not fit the rows")
                .on("imatrix")
                .want("(groups, " + std::to_string(k) + ") with groups dividing " + std::to_string(shape.rows));
        check_importance(importance.data(), groups, k);
        per_importance = std::max<std::uint64_t>(1, shape.rows / groups);
    }
    const Encoder encoder(type, k, best);
    over_rows(type, shape, threads, cancel, poll, [&](std::uint64_t first, std::uint64_t count) {
        while (count) {  // never across from one importance row to the next
            const std::uint64_t n = per_importance ? std::min(count, per_importance - first % per_importance) : count;
            encoder.encode(source + first * k, target + first * bytes, n,
                           per_importance ? importance.data() + first / per_importance * k : nullptr, first);
            first += n;
            count -= n;
        }
    });
}

void dequantize_rows(const TypeFacts& type, RowsOf shape, const std::byte* source, float* target, int threads,
                     Cancel& cancel, const std::function<void()>& poll) {
    const std::uint64_t k = shape.row_elements, bytes = row_bytes(type, k);
    const Decoder decoder(type, k);
    over_rows(type, shape, threads, cancel, poll, [&](std::uint64_t first, std::uint64_t count) {
        decoder.decode(source + first * bytes, target + first * k, count);
    });
}

}  // namespace pgs
