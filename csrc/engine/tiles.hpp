// How jobs become tiles, pieces of work that any thread can do in any order, and how their bytes are read.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/parallel.hpp"
#include "engine/job.hpp"
#include "io/source.hpp"

namespace pgs {

struct RunOptions {
    std::uint64_t memory = 512ull << 20;  // bytes, bounds every buffer of the run
    int threads = 0;                      // 0: thread_count
    Io io = Io::automatic;
    bool overwrite = false;
};

// Threads and tile size that fit `memory`; Error(bad_plan) names the tensor whose row does not fit with one thread.
struct Budget {
    int threads;
    std::uint64_t tile_bytes;    // of source or target, whichever is larger
    std::uint64_t buffer_bytes;  // all buffers of all threads
};

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

// The same files, opened for bulk reading; Error(source_changed) if one is no longer what it was.
using Sources = std::vector<std::unique_ptr<Source>>;
Sources reopen_sources(const std::vector<std::shared_ptr<Source>>& sources, Io io);

// The importance rows of jobs, for one thread. The last one that was read is kept: chunks and tiles go row by row.
class ImportanceReader {
public:
    // `buffer` holds tile_buffers().importance bytes. No job may go away before the reader.
    ImportanceReader(const Sources& sources, float* buffer) : sources_(sources), buffer_(buffer) {}
    // Importance row `index`, divided and checked, until the next call.
    const float* row(const Job& job, std::uint64_t index);

private:
    const Sources& sources_;
    float* buffer_;
    const Job* job_ = nullptr;  // whose row is in the buffer
    std::uint64_t index_ = 0;
};

// The concatenation of a job's runs, as one readable range of bytes.
class RunReader {
public:
    RunReader(const Job& job, const Sources& sources);
    void read_at(std::uint64_t offset, std::span<std::byte> out) const;

private:
    const Job& job_;
    const Sources& sources_;
    std::vector<std::uint64_t> starts_;  // of each run within the concatenation
};

}  // namespace pgs
