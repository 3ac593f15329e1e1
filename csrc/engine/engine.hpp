// The engine: moves, decodes and encodes tensor bytes as a checked plan says. It decides nothing.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/parallel.hpp"
#include "io/sink.hpp"
#include "io/source.hpp"

namespace pgs {

// A run of whole rows in a source file; of source `fill` the four bytes of `offset`, little-endian, over and over.
struct Run {
    static constexpr std::uint32_t fill = UINT32_MAX;
    std::uint32_t source;
    std::uint64_t offset, nbytes;
};

// Integer tensors whose values are expert ids, in columns of `column` values: id -> table[id]; where that is -1, the first
// id of `substitutes` (already new ids, best first) that its column does not hold yet.
struct Remap {
    std::vector<std::int32_t> table, substitutes;
    std::uint64_t column = 0;
};

// Slices of `slice_rows` rows: slice g of the output is the weighted mean of the slices of the source in groups[g]. The
// neurons of a member come in the order orders[order]: its rows, or with `columns` the elements of its rows.
struct Merge {
    static constexpr std::uint32_t as_is = UINT32_MAX;
    struct Part {
        std::uint32_t slice = 0, order = as_is;
        float weight = 1;  // those of a group add to one
    };
    std::uint64_t slice_rows = 0;
    bool columns = false;
    std::vector<std::vector<std::uint32_t>> orders;
    std::vector<std::vector<Part>> groups;  // the first part of a group is its centroid
};

// Where an importance row is: `row_elements` little-endian float32 at byte `at` of a source, or row `at` of those that
// the job itself holds. Each value is divided by `divisor`, in float32: llama.cpp's files hold sums and counts. The sums of
// a merged expert are added before: `more` are at the same source, their elements in the order of one of merge->orders.
struct ImportanceRow {
    static constexpr std::uint64_t in_memory = UINT64_MAX;
    struct More {
        std::uint64_t at = 0;
        std::uint32_t order = Merge::as_is;
    };
    std::uint64_t source = in_memory, at = 0;
    float divisor = 1;
    std::uint32_t order = Merge::as_is;
    std::vector<More> more;
};

// One output tensor. Its source bytes are the concatenation of `runs`, or `literal`.
struct Job {
    std::string name;
    std::uint32_t file = 0;  // index of the output
    std::int32_t source_type = 0, target_type = 0;
    std::uint64_t row_elements = 0, rows = 0;  // as encoded: both types have this shape
    std::vector<Run> runs;
    std::string literal;
    std::uint64_t target_offset = 0, target_bytes = 0;  // a multiple of 8 if encoded; without padding
    std::vector<ImportanceRow> importance_rows;         // rows / their number: consecutive rows that share one
    std::vector<float> importance;                      // the rows in memory, each of row_elements, checked
    bool best = false;                                  // encode with less error than ggml, where that is possible
    std::optional<Remap> remap;
    std::optional<Merge> merge;  // then the runs are all slices that a group may name
};

using Jobs = std::vector<std::shared_ptr<const Job>>;

struct RunOptions {
    std::uint64_t memory = 512ull << 20;  // bytes, bounds every buffer of the run
    int threads = 0;                      // 0: thread_count
    Io io = Io::automatic;
    bool overwrite = false;
};

struct RunStats {
    std::uint64_t bytes_read = 0, bytes_written = 0, elements_encoded = 0;  // of tensors; importance rows do not count
    std::uint64_t buffer_bytes = 0;                                         // the most that all buffers of the run held
    int threads = 0;
};

// Threads and tile size that fit `memory`; Error(bad_plan) names the tensor whose row does not fit with one thread.
struct Budget {
    int threads;
    std::uint64_t tile_bytes;    // of source or target, whichever is larger
    std::uint64_t buffer_bytes;  // all buffers of all threads
};
Budget plan_budget(const Jobs& jobs, const RunOptions& options);

struct Output {
    std::string path;
    std::string header;
    std::uint64_t file_bytes;  // of the whole file
};

// Writes header, jobs and padding of each output, all of them or none; the first output is the one that makes the others
// a model (see SinkSet for what holds when names change). Everything that can be wrong with the numbers is found before
// the first byte. `poll(done, total)` runs on the calling thread about every 20 ms, with bytes of output; an exception
// from it cancels the run and leaves nothing.
RunStats run(const std::vector<std::shared_ptr<Source>>& sources, const std::vector<Output>& outputs, const Jobs& jobs,
             const RunOptions& options, Cancel& cancel,
             const std::function<void(std::uint64_t done, std::uint64_t total)>& poll);

// Streamed statistics of rows, in float64, with a fixed order of sums: for each group of rows_per_group consecutive rows
// [sum |w|, sum w^2]. `result` is groups x 2. weights: empty, or groups x row_elements: then the second is sum weight w^2.
std::vector<double> reduce_rows(const std::vector<std::shared_ptr<Source>>& sources, const Job& job,
                                std::uint64_t rows_per_group, const std::vector<double>& weights,
                                const RunOptions& options, Cancel& cancel,
                                const std::function<void(std::uint64_t, std::uint64_t)>& poll);

}  // namespace pgs
