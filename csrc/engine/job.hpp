// What the engine is asked to do: one job for each output tensor.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

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
    std::uint64_t target_offset = 0;                                             // a multiple of 8 if encoded
    std::uint64_t source_row_bytes = 0, target_row_bytes = 0, target_bytes = 0;  // see resolve_sizes; without padding
    std::vector<ImportanceRow> importance_rows;  // rows / their number: consecutive rows that share one
    std::vector<float> importance;               // the rows in memory, each of row_elements, checked
    bool best = false;                           // encode with less error than ggml, where that is possible
    std::optional<Remap> remap;
    std::optional<Merge> merge;  // then the runs are all slices that a group may name
};

using Jobs = std::vector<std::shared_ptr<const Job>>;

enum class Work { move, encode, remap, merge, literal };
Work work_of(const Job& job);
bool by_row(const Job& job);  // all but move and literal

// Fills in the numbers of bytes, which follow from the types and the shape. Error(unsupported) for an unknown type,
// Error(bad_plan) for a size that overflows.
void resolve_sizes(Job& job);

// Checks that a job's numbers agree with each other and with its sources; Error(bad_plan) on the job's name.
void check_job(const Job& job, const std::vector<std::shared_ptr<Source>>& sources);

}  // namespace pgs
