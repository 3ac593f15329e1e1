// The kinds of work: how the bytes of one tile are made.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/parallel.hpp"
#include "engine/buffers.hpp"
#include "engine/tiles.hpp"

namespace pgs {

// What a tile took.
struct TileWork {
    std::uint64_t bytes_read = 0, elements_encoded = 0;
};

// Makes the bytes of `tile`, of any kind but literal, at `target`. `target` lies in buffers.target.
TileWork do_tile(const Job& job, const Tile& tile, const RunReader& reader, Buffers& buffers, std::byte* target,
                 const Cancel& cancel);

}  // namespace pgs
