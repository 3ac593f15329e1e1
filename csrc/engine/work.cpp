#include "engine/work.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/error.hpp"
#include "quant/types.hpp"

namespace pgs {

namespace {

void remap_ids(const Remap& remap, const std::byte* source, std::byte* target, std::uint64_t bytes) {
    std::vector<std::int32_t> column(remap.column);
    const std::uint64_t column_bytes = remap.column * sizeof(std::int32_t);
    for (std::uint64_t at = 0; at < bytes; at += column_bytes) {
        std::memcpy(column.data(), source + at, column_bytes);
        for (auto& id : column) {
            if (id < 0 || static_cast<std::size_t>(id) >= remap.table.size())
                throw Error(Kind::bad_file, "expert id out of range")
                    .got(std::to_string(id))
                    .want("0 to " + std::to_string(remap.table.size() - 1));
        }
        // Kept ids first, so that a substitute never repeats one that comes later in the column.
        std::vector<std::int32_t> out(column.size(), -1);
        for (std::size_t i = 0; i < column.size(); ++i) out[i] = remap.table[static_cast<std::size_t>(column[i])];
        for (auto& id : out) {
            if (id >= 0) continue;
            const auto free = std::ranges::find_if(
                remap.substitutes, [&](std::int32_t s) { return std::ranges::find(out, s) == out.end(); });
            if (free == remap.substitutes.end())
                throw Error(Kind::bad_plan, "too few experts are left to replace dropped ids");
            id = *free;
        }
        std::memcpy(target + at, out.data(), column_bytes);
    }
}

}  // namespace

TileMaker::TileMaker(const Job& job, const Sources& sources) : job_(job), reader_(job, sources) {
    const Work work = work_of(job);
    if (work != Work::encode && work != Work::merge) return;
    const TypeFacts& source = type_facts(job.source_type);
    const TypeFacts& target = type_facts(job.target_type);
    if (source.decodes) decoder_.emplace(source, job.row_elements);
    if (target.encodes) encoder_.emplace(target, job.row_elements, job.best);
}

TileWork TileMaker::make(const Tile& tile, Buffers& buffers, std::byte* target, const Cancel& cancel) const {
    switch (work_of(job_)) {
        case Work::literal:
        case Work::move: return copy(tile, target);
        case Work::remap: return remap(tile, buffers, target);
        case Work::encode: return encode(tile, buffers, target, cancel);
        case Work::merge: return merge(tile, buffers, target, cancel);
    }
    return {};
}

TileWork TileMaker::copy(const Tile& tile, std::byte* target) const {
    reader_.read_at(tile.first, {target, tile.count});
    return {tile.count, 0};
}

TileWork TileMaker::remap(const Tile& tile, Buffers& buffers, std::byte* target) const {
    const std::uint64_t nbytes = tile.count * job_.source_row_bytes;
    reader_.read_at(tile.first * job_.source_row_bytes, {buffers.source.get(), nbytes});
    remap_ids(*job_.remap, buffers.source.get(), target, nbytes);
    return {nbytes, 0};
}

TileWork TileMaker::encode(const Tile& tile, Buffers& buffers, std::byte* target, const Cancel& cancel) const {
    const std::uint64_t nbytes = tile.count * job_.source_row_bytes;
    reader_.read_at(tile.first * job_.source_row_bytes, {buffers.source.get(), nbytes});
    encode_rows(tile, buffers.source.get(), &*decoder_, buffers, target, cancel);
    return {nbytes, tile.count * job_.row_elements};
}

// The rows of `tile`, which are at `source`: decode a chunk, encode it, next chunk. Without a decoder they are float32.
void TileMaker::encode_rows(const Tile& tile, const std::byte* source, const Decoder* decoder, Buffers& buffers,
                            std::byte* target, const Cancel& cancel) const {
    const std::uint64_t source_row = decoder ? job_.source_row_bytes : job_.row_elements * sizeof(float);
    const std::uint64_t per_importance = job_.importance_rows.empty() ? 0 : job_.rows / job_.importance_rows.size();
    const std::uint64_t step = chunk_rows(job_.row_elements);
    for (std::uint64_t done = 0; done < tile.count;) {
        cancel.check();
        const std::uint64_t row = tile.first + done;
        std::uint64_t n = std::min(step, tile.count - done);
        const float* importance = nullptr;
        if (per_importance) {  // a chunk never crosses from one importance row to the next
            n = std::min(n, per_importance - row % per_importance);
            importance = buffers.importance.row(job_, row / per_importance);
        }
        const std::byte* from = source + done * source_row;
        const float* values = decoder ? decoder->in_place(from) : reinterpret_cast<const float*>(from);
        if (!values) {
            float* const floats = floats_of(buffers.floats);
            decoder->decode(from, floats, n);
            values = floats;
        }
        encoder_->encode(values, target + done * job_.target_row_bytes, n, importance, row);
        done += n;
    }
}

// All rows of a tile are of one group: c + sum w (x - c), which leaves a centroid c alone where its members are equal to
// it. A single expert whose type stays is copied.
TileWork TileMaker::merge(const Tile& tile, Buffers& buffers, std::byte* target, const Cancel& cancel) const {
    const Merge& merge = *job_.merge;
    const auto& group = merge.groups[tile.first / merge.slice_rows];
    const std::uint64_t nbytes = tile.count * job_.source_row_bytes;
    const bool converts = job_.source_type != job_.target_type;
    const TileWork work{group.size() * nbytes, group.size() > 1 || converts ? tile.count * job_.row_elements : 0};
    if (group.size() == 1 && !group[0].order) {
        std::byte* const source = buffers.source.get();
        const std::uint64_t row = group[0].slice * merge.slice_rows + tile.first % merge.slice_rows;
        reader_.read_at(row * job_.source_row_bytes, {converts ? source : target, nbytes});
        if (converts) encode_rows(tile, source, &*decoder_, buffers, target, cancel);
        return work;
    }
    for (const Merge::Member& member : group) add_member(member, &member == group.data(), tile, buffers, cancel);
    encode_rows(tile, buffers.sums.get(), nullptr, buffers, target, cancel);
    return work;
}

// Adds a member of a group to the sum of the tile's rows, in buffers.sums; behind the sum are the rows of the first one,
// the centroid.
void TileMaker::add_member(const Merge::Member& member, bool is_first, const Tile& tile, Buffers& buffers,
                           const Cancel& cancel) const {
    const Merge& merge = *job_.merge;
    const std::uint64_t k = job_.row_elements, rows = merge.slice_rows, begin = tile.first % rows;
    const std::uint64_t source_row = job_.source_row_bytes, slice = member.slice * rows;
    std::byte* const source = buffers.source.get();
    float* const row = floats_of(buffers.floats);
    float* const sums = floats_of(buffers.sums);
    float* const centroids = sums + tile.count * k;
    const std::uint32_t* order = member.order ? merge.orders[*member.order].data() : nullptr;
    const bool mixed = order && !merge.columns;  // rows of the tile lie anywhere in the slice
    const bool permute = order && merge.columns;
    const bool whole = tile.count == rows;
    if (!mixed || whole) {
        reader_.read_at((slice + begin) * source_row, {source, tile.count * source_row});
    } else {
        for (std::uint64_t i = 0; i < tile.count; ++i)
            reader_.read_at((slice + order[begin + i]) * source_row, {source + i * source_row, source_row});
    }
    for (std::uint64_t i = 0; i < tile.count; ++i) {
        if (i % 64 == 0) cancel.check();
        const std::uint64_t from = mixed && whole ? order[i] : i;
        decoder_->decode(source + from * source_row, row, 1);
        float* const sum = sums + i * k;
        float* const centroid = centroids + i * k;
        for (std::uint64_t j = 0; j < k; ++j) {
            const float x = row[permute ? order[j] : j];
            if (is_first)
                sum[j] = centroid[j] = x;
            else
                sum[j] += member.weight * (x - centroid[j]);
        }
    }
}

}  // namespace pgs
