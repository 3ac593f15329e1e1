// What the engine is asked to do: one job for each output tensor.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "io/source.hpp"

namespace pgs {

// A run of whole rows in a source file, or, without a source, of one value over and over.
struct Run {
    std::optional<std::uint32_t> source;
    std::uint64_t offset = 0, nbytes = 0;
    float value = 0;
};

// Integer tensors whose values are expert ids, in columns of `column` values: id -> table[id]; where that is -1, the first
// id of `substitutes` (already new ids, best first) that its column does not hold yet.
struct Remap {
    std::vector<std::int32_t> table, substitutes;
    std::uint64_t column = 0;
};

// Slices of `slice_rows` rows: slice g of the output is the weighted mean of the slices of the source in groups[g]. The
// neurons of a member come in the order orders[*order]: its rows, or with `columns` the elements of its rows; without an
// order they stay where they are.
struct Merge {
    struct Member {
        std::uint32_t slice = 0;
        float weight = 1;  // those of a group add to one
        std::optional<std::uint32_t> order;
    };
    std::uint64_t slice_rows = 0;
    bool columns = false;
    std::vector<std::vector<std::uint32_t>> orders;
    std::vector<std::vector<Member>> groups;  // the first member of a group is its centroid
};

// An importance row. Its values are those in memory, or the sum of `parts`: `row_elements` little-endian float32 at byte
// `offset` of a source, the elements in an order of the job's merge or as they are. Each is divided by `divisor`, in
// float32: llama.cpp's files hold sums and counts.
struct ImportanceRow {
    struct Part {
        std::uint64_t offset = 0;
        std::optional<std::uint32_t> order;
    };
    std::uint32_t source = 0;
    std::vector<Part> parts;
    std::shared_ptr<const std::vector<float>> held;  // null: the row is in the source
    float divisor = 1;
};

// One output tensor. Its source bytes are the concatenation of `runs`, or `literal`.
struct Job {
    std::string name;
    std::uint32_t file = 0;  // index of the output
    std::int32_t source_type = 0, target_type = 0;
    std::uint64_t row_elements = 0, rows = 0;  // as encoded: both types have this shape
    std::vector<Run> runs;
    std::string literal;
    std::uint64_t target_offset = 0;             // a multiple of 8 if encoded
    std::vector<ImportanceRow> importance_rows;  // rows / their number: consecutive rows that share one
    bool best = false;                           // encode with less error than ggml, where that is possible
    std::optional<Remap> remap;
    std::optional<Merge> merge;  // then the runs are all slices that a group may name

    // What follows from these; see complete. target_bytes: without padding.
    std::uint64_t source_row_bytes = 0, target_row_bytes = 0, target_bytes = 0;
};

using Jobs = std::vector<std::shared_ptr<const Job>>;

enum class Work { move, encode, remap, merge, literal };
Work work_of(const Job& job);
bool by_row(const Job& job);  // all but move and literal

// Fills in the numbers of bytes and checks the importance rows in memory. Error(unsupported) for an unknown type,
// Error(bad_plan) for a size that overflows and for a row that check_importance refuses.
void complete(Job& job);

// Checks that a job's numbers agree with each other and with its sources; Error(bad_plan) on the job's name.
void check_job(const Job& job, const std::vector<std::shared_ptr<Source>>& sources);

}  // namespace pgs
