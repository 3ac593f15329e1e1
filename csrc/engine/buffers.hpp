// The buffers that the workers of a run fill and empty.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/tiles.hpp"
#include "io/sys.hpp"

namespace pgs {

// Large enough for a tile of every job.
TileBuffers largest_buffers(const Jobs& jobs, std::uint64_t tile_bytes);

float* floats_of(const PageBuffer& buffer);

// Those of one worker.
struct Buffers {
    PageBuffer source, target, floats, importance_row, sums;
    ImportanceReader importance;
    Buffers(const TileBuffers& sizes, const Sources& sources);
};

// The buffers of each worker, made by the worker itself, so that memory is local to it.
class BufferPool {
public:
    BufferPool(int threads, const TileBuffers& sizes, const Sources& sources)
        : sizes_(sizes), sources_(sources), buffers_(static_cast<std::size_t>(threads)) {}
    Buffers& of(int worker);

private:
    TileBuffers sizes_;
    const Sources& sources_;
    std::vector<std::unique_ptr<Buffers>> buffers_;
};

}  // namespace pgs
