// The kinds of work: how the bytes of one tile are made.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/parallel.hpp"
#include "engine/buffers.hpp"
#include "engine/tiles.hpp"
#include "quant/rows.hpp"

namespace pgs {

// What a tile took.
struct TileWork {
    std::uint64_t bytes_read = 0, elements_encoded = 0;
};

// Makes the tiles of one job, whose bytes, decoder and encoder it finds once. Any thread may use it. No job and no source
// may go away before it.
class TileMaker {
public:
    TileMaker(const Job& job, const Sources& sources);

    // The bytes of `tile`, of any kind of work, at `target`, which lies in buffers.target.
    TileWork make(const Tile& tile, Buffers& buffers, std::byte* target, const Cancel& cancel) const;

private:
    TileWork copy(const Tile& tile, std::byte* target) const;
    TileWork remap(const Tile& tile, Buffers& buffers, std::byte* target) const;
    TileWork encode(const Tile& tile, Buffers& buffers, std::byte* target, const Cancel& cancel) const;
    TileWork merge(const Tile& tile, Buffers& buffers, std::byte* target, const Cancel& cancel) const;
    void add_member(const Merge::Member& member, bool is_first, const Tile& tile, Buffers& buffers,
                    const Cancel& cancel) const;
    void encode_rows(const Tile& tile, const std::byte* source, const Decoder* decoder, Buffers& buffers,
                     std::byte* target, const Cancel& cancel) const;

    const Job& job_;
    RunReader reader_;
    // Where the kind of work needs them and the types have them.
    std::optional<Decoder> decoder_;
    std::optional<Encoder> encoder_;
};

}  // namespace pgs
