#include "engine/tiles.hpp"

#include <algorithm>

#include "base/checked.hpp"
#include "base/error.hpp"
#include "quant/types.hpp"

namespace pgs {

namespace {

constexpr std::uint64_t block = 4096;
constexpr std::uint64_t chunk_elements = 32768;

std::uint64_t rows_per_tile(const Job& job, std::uint64_t tile_bytes) {
    const std::uint64_t row = std::max(row_bytes(job.source_type, job.row_elements), row_bytes(job.target_type, job.row_elements));
    return std::max<std::uint64_t>(1, tile_bytes / std::max<std::uint64_t>(1, row));
}

}  // namespace

Work work_of(const Job& job) {
    if (job.remap) return Work::remap;
    if (job.source_type != job.target_type) return Work::encode;
    return job.runs.empty() ? Work::literal : Work::move;
}

std::uint64_t chunk_rows(std::uint64_t row_elements) {
    return std::max<std::uint64_t>(1, chunk_elements / std::max<std::uint64_t>(1, row_elements));
}

void append_tiles(const Job& job, std::uint32_t index, std::uint64_t tile_bytes, std::vector<Tile>& tiles) {
    const Work work = work_of(job);
    if (work == Work::move || work == Work::literal) {
        // Cut where the file offset is a multiple of the tile, so that whole blocks are written.
        std::uint64_t at = job.target_offset;
        const std::uint64_t end = job.target_offset + job.target_bytes;
        while (at < end) {
            const std::uint64_t next = std::min(end, at / tile_bytes * tile_bytes + tile_bytes);
            tiles.push_back({index, at - job.target_offset, next - at});
            at = next;
        }
        return;
    }
    const std::uint64_t step = rows_per_tile(job, tile_bytes);
    for (std::uint64_t row = 0; row < job.rows; row += step)
        tiles.push_back({index, row, std::min(step, job.rows - row)});
}

TileBuffers tile_buffers(const Job& job, std::uint64_t tile_bytes) {
    switch (work_of(job)) {
        case Work::literal: return {};
        case Work::move: return {0, std::min(job.target_bytes, tile_bytes) + block, 0};
        case Work::remap:
        case Work::encode: break;
    }
    const std::uint64_t rows = std::min(job.rows, rows_per_tile(job, tile_bytes));
    TileBuffers b{rows * row_bytes(job.source_type, job.row_elements), rows * row_bytes(job.target_type, job.row_elements) + block,
                  std::min(job.rows, chunk_rows(job.row_elements)) * job.row_elements * sizeof(float)};
    return b;
}

void check_job(const Job& job, const std::vector<std::shared_ptr<Source>>& sources) {
    auto fail = [&](const char* problem) -> Error { return std::move(Error(Kind::bad_plan, problem).on(job.name)); };
    const auto& table = type_table();
    for (std::int32_t type : {job.source_type, job.target_type}) {
        if (type < 0 || static_cast<std::size_t>(type) >= table.size() || table[type].name.empty()) throw fail("unknown tensor type");
        if (job.row_elements % table[type].block) throw fail("row length is no multiple of the block");
    }
    const auto source_bytes = checked_mul(job.rows, row_bytes(job.source_type, job.row_elements));
    const auto target_bytes = checked_mul(job.rows, row_bytes(job.target_type, job.row_elements));
    if (!source_bytes || !target_bytes || !checked_add(job.target_offset, *target_bytes)) throw fail("size overflows");
    if (*target_bytes != job.target_bytes) throw fail("target size does not follow from the shape");
    std::uint64_t sum = job.literal.size();
    for (const Run& run : job.runs) {
        if (run.source >= sources.size()) throw fail("no such source");
        const auto end = checked_add(run.offset, run.nbytes);
        if (!end || *end > sources[run.source]->size()) throw fail("run reaches beyond its source");
        const auto next = checked_add(sum, run.nbytes);
        if (!next) throw fail("size overflows");
        sum = *next;
    }
    if (!job.literal.empty() && !job.runs.empty()) throw fail("both runs and literal");
    if (sum != *source_bytes) throw fail("source size does not follow from the shape");
    if (job.source_type != job.target_type && (!type_can_decode(job.source_type) || !type_can_encode(job.target_type)))
        throw Error(Kind::unsupported, "no conversion between these types").on(job.name)
            .got(table[job.source_type].name + " to " + table[job.target_type].name);
    if (job.remap) {
        if (table[job.source_type].name != "I32" || job.source_type != job.target_type) throw fail("remap needs I32");
        if (job.remap->column == 0 || job.row_elements % job.remap->column) throw fail("remap column does not divide the row");
    }
    if (job.importance_rows) {
        const auto n = checked_mul(job.importance_rows, job.row_elements);
        if (!n || *n != job.importance.size() || job.rows % job.importance_rows) throw fail("importance does not fit the rows");
    } else if (!job.importance.empty()) {
        throw fail("importance does not fit the rows");
    }
}

std::vector<std::unique_ptr<Source>> reopen_sources(const std::vector<std::shared_ptr<Source>>& sources, Io io) {
    std::vector<std::unique_ptr<Source>> out;
    for (const auto& s : sources) out.push_back(open_source(s->path(), io, &s->identity()));
    return out;
}

RunReader::RunReader(const Job& job, const std::vector<std::unique_ptr<Source>>& sources) : job_(job), sources_(sources) {
    std::uint64_t at = 0;
    for (const Run& run : job.runs) {
        starts_.push_back(at);
        at += run.nbytes;
    }
}

void RunReader::read_at(std::uint64_t offset, std::span<std::byte> out) const {
    if (job_.runs.empty()) {
        std::copy_n(reinterpret_cast<const std::byte*>(job_.literal.data()) + offset, out.size(), out.data());
        return;
    }
    std::size_t i = static_cast<std::size_t>(std::upper_bound(starts_.begin(), starts_.end(), offset) - starts_.begin()) - 1;
    while (!out.empty()) {
        const Run& run = job_.runs[i];
        const std::uint64_t inside = offset - starts_[i];
        const std::uint64_t n = std::min<std::uint64_t>(out.size(), run.nbytes - inside);
        if (n) sources_[run.source]->read_at(run.offset + inside, out.first(n));
        out = out.subspan(n);
        offset += n;
        ++i;
    }
}

}  // namespace pgs
