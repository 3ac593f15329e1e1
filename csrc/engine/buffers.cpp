#include "engine/buffers.hpp"

#include <algorithm>

namespace pgs {

TileBuffers largest_buffers(const Jobs& jobs, std::uint64_t tile_bytes) {
    TileBuffers most;
    for (const auto& job : jobs) {
        const TileBuffers b = tile_buffers(*job, tile_bytes);
        most.source = std::max(most.source, b.source);
        most.target = std::max(most.target, b.target);
        most.floats = std::max(most.floats, b.floats);
        most.importance = std::max(most.importance, b.importance);
        most.sums = std::max(most.sums, b.sums);
    }
    return most;
}

float* floats_of(const PageBuffer& buffer) { return reinterpret_cast<float*>(buffer.get()); }

Buffers::Buffers(const TileBuffers& sizes, const Sources& sources)
    : source(page_buffer(sizes.source)),
      target(page_buffer(sizes.target)),
      floats(page_buffer(sizes.floats)),
      importance_row(page_buffer(sizes.importance)),
      sums(page_buffer(sizes.sums)),
      importance(sources, floats_of(importance_row)) {}

Buffers& BufferPool::of(int worker) {
    auto& b = buffers_[static_cast<std::size_t>(worker)];
    if (!b) b = std::make_unique<Buffers>(sizes_, sources_);
    return *b;
}

}  // namespace pgs
