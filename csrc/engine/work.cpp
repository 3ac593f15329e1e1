#include "engine/work.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"
#include "quant/rows.hpp"

namespace pgs {

namespace {

// Rows [first, first + count), of type `type`: decode a chunk, encode it, next chunk.
void encode_tile(const Job& job, std::int32_t type, std::uint64_t first, std::uint64_t count, const std::byte* source,
                 Buffers& buffers, std::byte* target, const Cancel& cancel) {
    float* const floats = floats_of(buffers.floats);
    static const std::int32_t f32 = type_from_name("F32");
    const std::uint64_t source_row = row_bytes(type, job.row_elements);
    const std::uint64_t target_row = row_bytes(job.target_type, job.row_elements);
    const std::uint64_t per_importance = job.importance_rows.empty() ? 0 : job.rows / job.importance_rows.size();
    const std::uint64_t step = chunk_rows(job.row_elements);
    for (std::uint64_t row = first; row < first + count;) {
        cancel.check();
        std::uint64_t n = std::min(step, first + count - row);
        const float* importance = nullptr;
        if (per_importance) {  // a chunk never crosses from one importance row to the next
            n = std::min(n, per_importance - row % per_importance);
            importance = buffers.importance.row(job, row / per_importance);
        }
        const std::byte* from = source + (row - first) * source_row;
        const bool as_is = type == f32 && reinterpret_cast<std::uintptr_t>(from) % alignof(float) == 0;
        if (!as_is) decode_rows(type, from, floats, n, job.row_elements);
        encode_rows(job.target_type, as_is ? reinterpret_cast<const float*>(from) : floats,
                    target + (row - first) * target_row, n, job.row_elements, importance, row, job.best);
        row += n;
    }
}

// Rows [first, first + count), all of one group: c + sum w (x - c), which leaves a centroid c alone where its members are
// equal to it. A single expert whose type stays is copied.
void merge_tile(const Job& job, std::uint64_t first, std::uint64_t count, const RunReader& reader, Buffers& buffers,
                std::byte* target, const Cancel& cancel) {
    static const std::int32_t f32 = type_from_name("F32");
    const Merge& merge = *job.merge;
    const std::uint64_t k = job.row_elements, rows = merge.slice_rows, begin = first % rows;
    const std::uint64_t source_row = row_bytes(job.source_type, k);
    const auto& group = merge.groups[first / rows];
    std::byte* const source = buffers.source.get();
    const bool single = group.size() == 1 && group[0].order == Merge::as_is;
    if (single) {
        const bool copy = job.source_type == job.target_type;
        reader.read_at((group[0].slice * rows + begin) * source_row, {copy ? target : source, count * source_row});
        if (!copy) encode_tile(job, job.source_type, first, count, source, buffers, target, cancel);
        return;
    }
    float* const row = floats_of(buffers.floats);
    float* const sum = floats_of(buffers.sums);
    float* const centroid = sum + count * k;
    for (const Merge::Part& part : group) {
        const std::uint64_t slice = part.slice * rows;
        const std::uint32_t* order = part.order == Merge::as_is ? nullptr : merge.orders[part.order].data();
        const bool mixed = order && !merge.columns;  // rows of the tile lie anywhere in the slice
        const bool whole = count == rows;
        if (!mixed || whole) {
            reader.read_at((slice + begin) * source_row, {source, count * source_row});
        } else {
            for (std::uint64_t i = 0; i < count; ++i)
                reader.read_at((slice + order[begin + i]) * source_row, {source + i * source_row, source_row});
        }
        const bool is_first = &part == group.data();
        for (std::uint64_t i = 0; i < count; ++i) {
            if (i % 64 == 0) cancel.check();
            const std::uint64_t from = mixed && whole ? order[i] : i;
            decode_rows(job.source_type, source + from * source_row, row, 1, k);
            float* const s = sum + i * k;
            float* const c = centroid + i * k;
            const bool permute = order && merge.columns;
            for (std::uint64_t j = 0; j < k; ++j) {
                const float x = row[permute ? order[j] : j];
                if (is_first)
                    s[j] = c[j] = x;
                else
                    s[j] += part.weight * (x - c[j]);
            }
        }
    }
    encode_tile(job, f32, first, count, reinterpret_cast<const std::byte*>(sum), buffers, target, cancel);
}

void remap_tile(const Job& job, const std::byte* source, std::byte* target, std::uint64_t bytes) {
    const Remap& remap = *job.remap;
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
            const auto free = std::find_if(remap.substitutes.begin(), remap.substitutes.end(), [&](std::int32_t s) {
                return std::find(out.begin(), out.end(), s) == out.end();
            });
            if (free == remap.substitutes.end())
                throw Error(Kind::bad_plan, "too few experts are left to replace dropped ids");
            id = *free;
        }
        std::memcpy(target + at, out.data(), column_bytes);
    }
}

TileWork copy(const Job&, const Tile& tile, const RunReader& reader, std::byte* target) {
    reader.read_at(tile.first, {target, tile.count});
    return {tile.count, 0};
}

TileWork remap(const Job& job, const Tile& tile, const RunReader& reader, Buffers& buffers, std::byte* target) {
    const std::uint64_t row = row_bytes(job.source_type, job.row_elements), nbytes = tile.count * row;
    std::byte* const source = buffers.source.get();
    reader.read_at(tile.first * row, {source, nbytes});
    remap_tile(job, source, target, nbytes);
    return {nbytes, 0};
}

TileWork encode(const Job& job, const Tile& tile, const RunReader& reader, Buffers& buffers, std::byte* target,
                const Cancel& cancel) {
    const std::uint64_t row = row_bytes(job.source_type, job.row_elements), nbytes = tile.count * row;
    std::byte* const source = buffers.source.get();
    reader.read_at(tile.first * row, {source, nbytes});
    encode_tile(job, job.source_type, tile.first, tile.count, source, buffers, target, cancel);
    return {nbytes, tile.count * job.row_elements};
}

TileWork merge(const Job& job, const Tile& tile, const RunReader& reader, Buffers& buffers, std::byte* target,
               const Cancel& cancel) {
    const auto& group = job.merge->groups[tile.first / job.merge->slice_rows];
    merge_tile(job, tile.first, tile.count, reader, buffers, target, cancel);
    const bool encoded = group.size() > 1 || job.source_type != job.target_type;
    return {group.size() * tile.count * row_bytes(job.source_type, job.row_elements),
            encoded ? tile.count * job.row_elements : 0};
}

}  // namespace

TileWork do_tile(const Job& job, const Tile& tile, const RunReader& reader, Buffers& buffers, std::byte* target,
                 const Cancel& cancel) {
    switch (work_of(job)) {
        case Work::literal: break;
        case Work::move: return copy(job, tile, reader, target);
        case Work::remap: return remap(job, tile, reader, buffers, target);
        case Work::encode: return encode(job, tile, reader, buffers, target, cancel);
        case Work::merge: return merge(job, tile, reader, buffers, target, cancel);
    }
    return {};
}

}  // namespace pgs
