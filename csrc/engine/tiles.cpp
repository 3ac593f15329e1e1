#include "engine/tiles.hpp"

#include <algorithm>
#include <array>
#include <bit>

#include "base/checked.hpp"
#include "base/error.hpp"
#include "base/words.hpp"
#include "quant/rows.hpp"

namespace pgs {

namespace {

constexpr std::uint64_t block = 4096;
// Long enough reads and writes for a fast disk, short enough to stop soon and to fit any budget with many threads.
constexpr std::uint64_t largest_tile = 4ull << 20;
constexpr std::uint64_t smallest_tile = 256ull << 10;
// Bounce buffers of direct I/O and unfinished blocks of the sink, per thread.
constexpr std::uint64_t io_bytes = 4ull << 20;

std::uint64_t rows_per_tile(const Job& job, std::uint64_t tile_bytes) {
    const std::uint64_t row = std::max(job.source_row_bytes, job.target_row_bytes);
    return std::max<std::uint64_t>(1, tile_bytes / std::max<std::uint64_t>(1, row));
}

// In memory as the encoder takes it.
bool as_is(const ImportanceRow& row) { return row.held && row.divisor == 1; }

// Of the tile of a merge, which never reaches from one slice into the next.
std::uint64_t merge_step(const Job& job, std::uint64_t tile_bytes) {
    return std::min(job.merge->slice_rows, rows_per_tile(job, tile_bytes));
}

}  // namespace

std::uint64_t tile_count(const Job& job, std::uint64_t tile_bytes) {
    if (job.target_bytes == 0) return 0;  // though it may have rows: of no elements
    if (job.merge) return job.merge->groups.size() * ((job.merge->slice_rows - 1) / merge_step(job, tile_bytes) + 1);
    if (by_row(job)) return (job.rows - 1) / rows_per_tile(job, tile_bytes) + 1;
    return (job.target_offset + job.target_bytes - 1) / tile_bytes - job.target_offset / tile_bytes + 1;
}

Tile tile_at(const Job& job, std::uint64_t tile_bytes, std::uint64_t index) {
    if (job.merge) {
        const std::uint64_t rows = job.merge->slice_rows, step = merge_step(job, tile_bytes);
        const std::uint64_t each = (rows - 1) / step + 1, first = index % each * step;
        return {index / each * rows + first, std::min(step, rows - first)};
    }
    if (by_row(job)) {
        const std::uint64_t step = rows_per_tile(job, tile_bytes);
        return {index * step, std::min(step, job.rows - index * step)};
    }
    // Cut where the file offset is a multiple of the tile, so that whole blocks are written.
    const std::uint64_t start = (job.target_offset / tile_bytes + index) * tile_bytes;
    const std::uint64_t begin = std::max(start, job.target_offset);
    const std::uint64_t end = std::min(start + tile_bytes, job.target_offset + job.target_bytes);
    return {begin - job.target_offset, end - begin};
}

TileBuffers tile_buffers(const Job& job, std::uint64_t tile_bytes) {
    switch (work_of(job)) {
        case Work::literal: return {};
        case Work::move: return {0, std::min(job.target_bytes, tile_bytes) + block, 0};
        case Work::remap:
        case Work::merge:
        case Work::encode: break;
    }
    const std::uint64_t rows =
        job.merge ? merge_step(job, tile_bytes) : std::min(job.rows, rows_per_tile(job, tile_bytes));
    TileBuffers b{rows * job.source_row_bytes, rows * job.target_row_bytes + block,
                  std::min(job.rows, chunk_rows(job.row_elements)) * job.row_elements * sizeof(float)};
    if (!std::ranges::all_of(job.importance_rows, as_is))
        b.importance = (job.merge ? 2 : 1) * job.row_elements * sizeof(float);
    if (job.merge) b.sums = 2 * rows * job.row_elements * sizeof(float);
    return b;
}

Budget fit_budget(const RunOptions& options, const std::string& name, std::uint64_t shared,
                  const std::function<std::uint64_t(std::uint64_t)>& bytes) {
    int threads = thread_count(options.threads);
    const std::uint64_t memory = options.memory - std::min(options.memory, shared);
    for (std::uint64_t tile = largest_tile;; tile /= 2) {
        const std::uint64_t each = bytes(tile) + io_bytes;
        const auto all = checked_mul<std::uint64_t>(each, static_cast<std::uint64_t>(threads));
        if (all && *all <= memory) return {threads, tile, *all + shared};
        if (tile > smallest_tile) continue;
        threads = static_cast<int>(std::min<std::uint64_t>(memory / each, static_cast<std::uint64_t>(threads)));
        if (threads) return {threads, tile, each * static_cast<std::uint64_t>(threads) + shared};
        throw Error(Kind::bad_plan, "a row does not fit the memory budget")
            .on(name)
            .got(bytes_text(options.memory))
            .want("at least " + std::to_string(each + shared))
            .advise("raise memory");
    }
}

Sources reopen_sources(const std::vector<std::shared_ptr<Source>>& sources, Io io) {
    Sources out;
    for (const auto& s : sources) out.push_back(open_source(s->path(), io, &s->identity()));
    return out;
}

const float* ImportanceReader::row(const Job& job, std::uint64_t index) {
    const ImportanceRow& row = job.importance_rows[index];
    if (as_is(row)) return row.held->data();
    if (job_ == &job && index_ == index) return buffer_;
    job_ = nullptr;  // until all of it is there
    const std::uint64_t n = job.row_elements;
    if (row.held) {
        std::copy_n(row.held->data(), n, buffer_);
    } else {
        Source& source = *sources_[row.source];
        float* const values = job.merge ? buffer_ + n : buffer_;  // sums of several are added in the buffer
        for (const ImportanceRow::Part& part : row.parts) {
            source.read_at(part.offset, std::as_writable_bytes(std::span(values, n)));
            if (values == buffer_) continue;
            const std::uint32_t* order = part.order ? job.merge->orders[*part.order].data() : nullptr;
            const bool first = &part == row.parts.data();
            for (std::uint64_t i = 0; i < n; ++i) {
                const float x = values[order ? order[i] : i];
                buffer_[i] = first ? x : buffer_[i] + x;
            }
        }
    }
    if (row.divisor != 1)
        for (std::uint64_t i = 0; i < n; ++i) buffer_[i] /= row.divisor;
    check_importance(buffer_, 1, n, index);
    job_ = &job;
    index_ = index;
    return buffer_;
}

RunReader::RunReader(const Job& job, const Sources& sources) : job_(job), sources_(sources) {
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
    std::size_t i = static_cast<std::size_t>(std::ranges::upper_bound(starts_, offset) - starts_.begin()) - 1;
    while (!out.empty()) {
        const Run& run = job_.runs[i];
        const std::uint64_t inside = offset - starts_[i];
        const std::uint64_t n = std::min<std::uint64_t>(out.size(), run.nbytes - inside);
        if (!run.source) {
            const auto pattern = std::bit_cast<std::array<std::byte, sizeof run.value>>(run.value);
            for (std::uint64_t j = 0; j < n; ++j) out[j] = pattern[(inside + j) % pattern.size()];
        } else if (n) {
            sources_[*run.source]->read_at(run.offset + inside, out.first(n));
        }
        out = out.subspan(n);
        offset += n;
        ++i;
    }
}

}  // namespace pgs
