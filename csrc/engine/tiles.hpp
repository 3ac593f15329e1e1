// How jobs become tiles, pieces of work that any thread can do in any order, and how their bytes are read.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/engine.hpp"

namespace pgs {

enum class Work { move, encode, remap, merge, literal };
Work work_of(const Job& job);
bool by_row(const Job& job);  // all but move and literal

// Bytes [first, first + count) of the target for `move` and `literal`, rows for the others.
struct Tile {
    std::uint64_t first, count;
};

// Tiles of `job` whose source and target hold at most about tile_bytes each (one row at least). Computed, not listed: a
// file of a terabyte has millions.
std::uint64_t tile_count(const Job& job, std::uint64_t tile_bytes);
Tile tile_at(const Job& job, std::uint64_t tile_bytes, std::uint64_t index);

// The largest buffers that a tile of this job needs, in bytes. sums: the tile's rows in float32, twice.
struct TileBuffers {
    std::uint64_t source = 0, target = 0, floats = 0, importance = 0, sums = 0;
    std::uint64_t total() const { return source + target + floats + importance + sums; }
};
TileBuffers tile_buffers(const Job& job, std::uint64_t tile_bytes);

// As many threads (at most those asked for) and then as large a tile as fit options.memory, where bytes(tile_bytes) are a
// thread's buffers and `shared` those of the run; Error(bad_plan) on `name` if not even one thread with the smallest tile
// does.
Budget fit_budget(const RunOptions& options, const std::string& name, std::uint64_t shared,
                  const std::function<std::uint64_t(std::uint64_t)>& bytes);

// Rows that are decoded and encoded at a time: a few ten thousand elements stay in the cache of a core, and even the
// slowest encoder is through them in tens of milliseconds.
std::uint64_t chunk_rows(std::uint64_t row_elements);

// Checks that a job's numbers agree with each other and with its sources; Error(bad_plan) on the job's name.
void check_job(const Job& job, const std::vector<std::shared_ptr<Source>>& sources);

// The same files, opened for bulk reading; Error(source_changed) if one is no longer what it was.
std::vector<std::unique_ptr<Source>> reopen_sources(const std::vector<std::shared_ptr<Source>>& sources, Io io);

// The importance rows of jobs, for one thread. The last one that was read is kept: chunks and tiles go row by row.
class ImportanceReader {
public:
    // `buffer` holds tile_buffers().importance bytes. No job may go away before the reader.
    ImportanceReader(const std::vector<std::unique_ptr<Source>>& sources, float* buffer)
        : sources_(sources), buffer_(buffer) {}
    // Importance row `index`, divided and checked, until the next call.
    const float* row(const Job& job, std::uint64_t index);

private:
    const std::vector<std::unique_ptr<Source>>& sources_;
    float* buffer_;
    const Job* job_ = nullptr;  // whose row is in the buffer
    std::uint64_t index_ = 0;
};

// The concatenation of a job's runs, as one readable range of bytes.
class RunReader {
public:
    RunReader(const Job& job, const std::vector<std::unique_ptr<Source>>& sources);
    void read_at(std::uint64_t offset, std::span<std::byte> out) const;

private:
    const Job& job_;
    const std::vector<std::unique_ptr<Source>>& sources_;
    std::vector<std::uint64_t> starts_;  // of each run within the concatenation
};

}  // namespace pgs
