#include "engine/engine.hpp"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "base/checked.hpp"
#include "base/error.hpp"
#include "engine/tiles.hpp"
#include "io/sys.hpp"
#include "quant/reference.hpp"

namespace pgs {

namespace {

// 4 MiB keeps an NVMe queue busy from two threads and costs nothing in memory; more measured no faster.
constexpr std::uint64_t largest_tile = 4ull << 20;
constexpr std::uint64_t smallest_tile = 256ull << 10;
// Bounce buffers of direct I/O and unfinished blocks of the sink, per thread.
constexpr std::uint64_t io_bytes = 4ull << 20;

TileBuffers largest_buffers(const std::vector<Job>& jobs, std::uint64_t tile_bytes) {
    TileBuffers most;
    for (const Job& job : jobs) {
        const TileBuffers b = tile_buffers(job, tile_bytes);
        most.source = std::max(most.source, b.source);
        most.target = std::max(most.target, b.target);
        most.floats = std::max(most.floats, b.floats);
    }
    return most;
}

struct Buffers {
    PageBuffer source, target, floats;
    explicit Buffers(const TileBuffers& b)
        : source(page_buffer(b.source)), target(page_buffer(b.target)), floats(page_buffer(b.floats)) {}
};

// The buffers of each worker, made by the worker itself, so that memory is local to it.
class BufferPool {
public:
    BufferPool(int threads, const TileBuffers& sizes) : sizes_(sizes), buffers_(static_cast<std::size_t>(threads)) {}
    Buffers& of(int worker) {
        auto& b = buffers_[static_cast<std::size_t>(worker)];
        if (!b) b = std::make_unique<Buffers>(sizes_);
        return *b;
    }

private:
    TileBuffers sizes_;
    std::vector<std::unique_ptr<Buffers>> buffers_;
};

// Rows [first, first + count): decode a chunk, encode it, next chunk.
void encode_tile(const Job& job, std::uint64_t first, std::uint64_t count, const std::byte* source, float* floats,
                 std::byte* target, const Cancel& cancel) {
    const std::uint64_t source_row = row_bytes(job.source_type, job.row_elements);
    const std::uint64_t target_row = row_bytes(job.target_type, job.row_elements);
    const std::uint64_t per_importance = job.importance_rows ? job.rows / job.importance_rows : 0;
    const std::uint64_t step = chunk_rows(job.row_elements);
    for (std::uint64_t row = first; row < first + count;) {
        cancel.check();
        std::uint64_t n = std::min(step, first + count - row);
        const float* importance = nullptr;
        if (per_importance) {  // a chunk never crosses from one importance row to the next
            n = std::min(n, per_importance - row % per_importance);
            importance = job.importance.data() + row / per_importance * job.row_elements;
        }
        decode_rows(job.source_type, source + (row - first) * source_row, floats, n, job.row_elements);
        encode_rows(job.target_type, floats, target + (row - first) * target_row, n, job.row_elements, importance, row);
        row += n;
    }
}

void remap_tile(const Job& job, const std::byte* source, std::byte* target, std::uint64_t bytes) {
    const Remap& remap = *job.remap;
    std::vector<std::int32_t> column(remap.column);
    const std::uint64_t column_bytes = remap.column * sizeof(std::int32_t);
    for (std::uint64_t at = 0; at < bytes; at += column_bytes) {
        std::memcpy(column.data(), source + at, column_bytes);
        for (auto& id : column) {
            if (id < 0 || static_cast<std::size_t>(id) >= remap.table.size())
                throw Error(Kind::bad_file, "expert id out of range").got(std::to_string(id))
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
            if (free == remap.substitutes.end()) throw Error(Kind::bad_plan, "too few experts are left to replace dropped ids");
            id = *free;
        }
        std::memcpy(target + at, out.data(), column_bytes);
    }
}

}  // namespace

Budget plan_budget(const std::vector<Job>& jobs, const RunOptions& options) {
    int threads = thread_count(options.threads);
    for (std::uint64_t tile = largest_tile;; tile /= 2) {
        const std::uint64_t each = largest_buffers(jobs, tile).total() + io_bytes;
        const auto all = checked_mul<std::uint64_t>(each, static_cast<std::uint64_t>(threads));
        if (all && *all <= options.memory) return {threads, tile, *all};
        if (tile > smallest_tile) continue;
        threads = static_cast<int>(std::min<std::uint64_t>(options.memory / each, static_cast<std::uint64_t>(threads)));
        if (threads) return {threads, tile, each * static_cast<std::uint64_t>(threads)};
        const auto worst = std::max_element(jobs.begin(), jobs.end(), [&](const Job& a, const Job& b) {
            return tile_buffers(a, tile).total() < tile_buffers(b, tile).total();
        });
        throw Error(Kind::bad_plan, "a row does not fit the memory budget").on(worst->name)
            .got(std::to_string(options.memory) + " bytes").want("at least " + std::to_string(each))
            .advise("raise memory");
    }
}

RunStats run(const std::vector<std::shared_ptr<Source>>& inputs, const std::string& output, const std::string& header,
             std::uint64_t file_bytes, const std::vector<Job>& jobs, const RunOptions& options, Cancel& cancel,
             const std::function<void(std::uint64_t, std::uint64_t)>& poll) {
    const Budget budget = plan_budget(jobs, options);

    // Everything that can be wrong is found before the first byte: each byte of the file has exactly one writer.
    struct Gap {
        std::uint64_t offset, nbytes;
    };
    std::vector<Gap> gaps;
    std::vector<const Job*> by_offset;
    for (const Job& job : jobs) {
        check_job(job, inputs);
        by_offset.push_back(&job);
    }
    std::stable_sort(by_offset.begin(), by_offset.end(), [](const Job* a, const Job* b) {
        return a->target_offset != b->target_offset ? a->target_offset < b->target_offset : a->target_bytes < b->target_bytes;
    });
    std::uint64_t at = header.size();
    for (const Job* job : by_offset) {
        if (job->target_offset < at) throw Error(Kind::bad_plan, "target overlaps what comes before it").on(job->name);
        if (job->target_offset > at) gaps.push_back({at, job->target_offset - at});
        at = job->target_offset + job->target_bytes;
    }
    if (at > file_bytes) throw Error(Kind::bad_plan, "tensors reach beyond the file");
    if (at < file_bytes) gaps.push_back({at, file_bytes - at});

    const auto sources = reopen_sources(inputs, options.io);
    std::vector<RunReader> readers;
    readers.reserve(jobs.size());
    for (const Job& job : jobs) readers.emplace_back(job, sources);
    std::vector<Tile> tiles;
    for (const Job* job : by_offset) append_tiles(*job, static_cast<std::uint32_t>(job - jobs.data()), budget.tile_bytes, tiles);

    SinkOptions sink_options{options.overwrite, options.io, {}};
    for (const auto& s : inputs) sink_options.inputs.push_back(s->identity());
    const auto sink = create_sink(output, file_bytes, sink_options);

    std::atomic<std::uint64_t> done{0}, read{0}, encoded{0};
    auto put = [&](std::uint64_t offset, const void* data, std::uint64_t n) {
        sink->write_at(offset, {static_cast<const std::byte*>(data), n});
        done.fetch_add(n, std::memory_order_relaxed);
    };
    put(0, header.data(), header.size());
    const std::vector<char> zeros(4096);
    for (Gap gap : gaps)
        for (; gap.nbytes; gap.offset += std::min<std::uint64_t>(gap.nbytes, zeros.size()), gap.nbytes -= std::min<std::uint64_t>(gap.nbytes, zeros.size()))
            put(gap.offset, zeros.data(), std::min<std::uint64_t>(gap.nbytes, zeros.size()));

    BufferPool pool(budget.threads, largest_buffers(jobs, budget.tile_bytes));
    auto work = [&](int worker, std::uint64_t item) {
        const Tile& tile = tiles[item];
        const Job& job = jobs[tile.job];
        const RunReader& reader = readers[tile.job];
        try {
            const Work kind = work_of(job);
            if (kind == Work::literal) return put(job.target_offset + tile.first, job.literal.data() + tile.first, tile.count);
            Buffers& b = pool.of(worker);
            const bool by_row = kind != Work::move;
            const std::uint64_t target_row = by_row ? row_bytes(job.target_type, job.row_elements) : 1;
            const std::uint64_t source_row = by_row ? row_bytes(job.source_type, job.row_elements) : 1;
            const std::uint64_t offset = job.target_offset + tile.first * target_row;
            // The place in the buffer agrees with the place in the file, so that direct I/O can write from here.
            std::byte* target = b.target.get() + offset % 4096;
            std::byte* source = by_row ? b.source.get() : target;
            const std::uint64_t nbytes = tile.count * source_row;
            reader.read_at(tile.first * source_row, {source, nbytes});
            read.fetch_add(nbytes, std::memory_order_relaxed);
            if (kind == Work::remap) remap_tile(job, source, target, nbytes);
            if (kind == Work::encode) {
                encode_tile(job, tile.first, tile.count, source, reinterpret_cast<float*>(b.floats.get()), target, cancel);
                encoded.fetch_add(tile.count * job.row_elements, std::memory_order_relaxed);
            }
            cancel.check();
            put(offset, target, tile.count * target_row);
        } catch (Error& e) {
            if (e.object.empty()) e.object = job.name;
            throw;
        }
    };
    parallel_for(budget.threads, tiles.size(), cancel, work, [&] {
        if (poll) poll(done.load(std::memory_order_relaxed), file_bytes);
    });
    for (const auto& s : sources) s->check_unchanged();
    sink->commit();
    return {read, done, encoded, budget.buffer_bytes, budget.threads};
}

}  // namespace pgs
