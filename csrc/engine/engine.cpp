#include "engine/engine.hpp"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "base/checked.hpp"
#include "base/error.hpp"
#include "engine/tiles.hpp"
#include "io/sink_set.hpp"
#include "io/sys.hpp"
#include "quant/reference.hpp"

namespace pgs {

namespace {

using Sources = std::vector<std::unique_ptr<Source>>;

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

struct Buffers {
    PageBuffer source, target, floats, importance_row, sums;
    ImportanceReader importance;
    Buffers(const TileBuffers& b, const Sources& sources)
        : source(page_buffer(b.source)),
          target(page_buffer(b.target)),
          floats(page_buffer(b.floats)),
          importance_row(page_buffer(b.importance)),
          sums(page_buffer(b.sums)),
          importance(sources, floats_of(importance_row)) {}
};

// The buffers of each worker, made by the worker itself, so that memory is local to it.
class BufferPool {
public:
    BufferPool(int threads, const TileBuffers& sizes, const Sources& sources)
        : sizes_(sizes), sources_(sources), buffers_(static_cast<std::size_t>(threads)) {}
    Buffers& of(int worker) {
        auto& b = buffers_[static_cast<std::size_t>(worker)];
        if (!b) b = std::make_unique<Buffers>(sizes_, sources_);
        return *b;
    }

private:
    TileBuffers sizes_;
    const Sources& sources_;
    std::vector<std::unique_ptr<Buffers>> buffers_;
};

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

// A stretch of an output: a job, or padding. Padding is written where its turn comes, since the sink keeps every block
// that is not complete yet.
struct Part {
    const Job* job;
    std::optional<RunReader> reader;
    std::size_t file;
    std::uint64_t offset, nbytes;
    std::uint64_t first_item;  // of parallel_for; a job has tile_count of them, padding one
};

// What lies behind the headers, file by file and in order. Error(bad_plan) unless each byte has exactly one writer.
struct Layout {
    std::vector<Part> parts;
    std::uint64_t items = 0, total_bytes = 0;
};
Layout lay_out(const std::vector<Output>& outputs, const Jobs& jobs, const Sources& sources, std::uint64_t tile_bytes) {
    Layout layout;
    std::vector<const Job*> in_order;
    for (const auto& job : jobs) {
        if (job->file >= outputs.size())
            throw Error(Kind::bad_plan, "no such output file").on(job->name).got(std::to_string(job->file));
        in_order.push_back(job.get());
    }
    std::stable_sort(in_order.begin(), in_order.end(), [](const Job* a, const Job* b) {
        return std::tie(a->file, a->target_offset, a->target_bytes) <
               std::tie(b->file, b->target_offset, b->target_bytes);
    });
    auto next = in_order.begin();
    for (std::size_t file = 0; file < outputs.size(); ++file) {
        const std::uint64_t file_bytes = outputs[file].file_bytes;
        const auto total = checked_add(layout.total_bytes, file_bytes);
        if (!total || *total > INT64_MAX)
            throw Error(Kind::bad_plan, "size of the file overflows").in(outputs[file].path);
        layout.total_bytes = *total;
        std::uint64_t at = outputs[file].header.size();
        if (at > file_bytes) throw Error(Kind::bad_plan, "the header reaches beyond the file").in(outputs[file].path);
        auto pad_to = [&](std::uint64_t end) {
            if (end > at) layout.parts.push_back({nullptr, std::nullopt, file, at, end - at, layout.items++});
        };
        for (; next != in_order.end() && (*next)->file == file; ++next) {
            const Job& job = **next;
            if (job.target_offset < at)
                throw Error(Kind::bad_plan, "target overlaps what comes before it").on(job.name);
            if (job.target_offset + job.target_bytes > file_bytes)
                throw Error(Kind::bad_plan, "tensors reach beyond the file").on(job.name);
            pad_to(job.target_offset);
            at = job.target_offset + job.target_bytes;
            if (job.target_bytes)
                layout.parts.push_back(
                    {&job, RunReader(job, sources), file, job.target_offset, job.target_bytes, layout.items});
            layout.items += tile_count(job, tile_bytes);
        }
        pad_to(file_bytes);
    }
    return layout;
}

}  // namespace

Budget plan_budget(const Jobs& jobs, const RunOptions& options) {
    const auto longest_row = std::max_element(jobs.begin(), jobs.end(), [](const auto& a, const auto& b) {
        return tile_buffers(*a, 0).total() < tile_buffers(*b, 0).total();
    });
    // A job's own importance rows and orders are memory that the caller has filled already; they count all the same.
    std::uint64_t held = 0;
    for (const auto& job : jobs) {
        held += job->importance.size() * sizeof(float);
        if (job->merge)
            for (const auto& order : job->merge->orders) held += order.size() * sizeof(order[0]);
    }
    return fit_budget(options, longest_row == jobs.end() ? "" : (*longest_row)->name, held,
                      [&](std::uint64_t tile_bytes) { return largest_buffers(jobs, tile_bytes).total(); });
}

RunStats run(const std::vector<std::shared_ptr<Source>>& inputs, const std::vector<Output>& outputs, const Jobs& jobs,
             const RunOptions& options, Cancel& cancel, const std::function<void(std::uint64_t, std::uint64_t)>& poll) {
    const Budget budget = plan_budget(jobs, options);
    for (const auto& job : jobs) check_job(*job, inputs);
    const auto sources = reopen_sources(inputs, options.io);
    const Layout layout = lay_out(outputs, jobs, sources, budget.tile_bytes);

    std::vector<SinkFile> files;
    for (const Output& output : outputs) files.push_back({output.path, output.file_bytes});
    SinkOptions sink_options{options.overwrite, options.io, {}};
    for (const auto& s : inputs) sink_options.inputs.push_back(s->identity());
    SinkSet sinks(files, sink_options);

    std::atomic<std::uint64_t> done{0}, read{0}, encoded{0};
    std::vector<std::atomic<std::uint64_t>> written(outputs.size());
    auto put = [&](std::size_t file, std::uint64_t offset, const void* data, std::uint64_t n) {
        sinks.write_at(file, offset, {static_cast<const std::byte*>(data), n});
        done.fetch_add(n, std::memory_order_relaxed);
        // A shard that is complete lets go of the page cache now, not when the last one is.
        if (written[file].fetch_add(n) + n == outputs[file].file_bytes && n && outputs.size() > 1) sinks.finish(file);
    };
    for (std::size_t file = 0; file < outputs.size(); ++file)
        put(file, 0, outputs[file].header.data(), outputs[file].header.size());
    const std::vector<char> zeros(4096);
    BufferPool pool(budget.threads, largest_buffers(jobs, budget.tile_bytes), sources);
    auto work = [&](int worker, std::uint64_t item) {
        const auto after = std::upper_bound(layout.parts.begin(), layout.parts.end(), item,
                                            [](std::uint64_t i, const Part& p) { return i < p.first_item; });
        const Part& part = *std::prev(after);
        if (!part.job) {
            for (std::uint64_t done_here = 0, n; done_here < part.nbytes; done_here += n) {
                cancel.check();
                n = std::min<std::uint64_t>(part.nbytes - done_here, zeros.size());
                put(part.file, part.offset + done_here, zeros.data(), n);
            }
            return;
        }
        const Job& job = *part.job;
        const RunReader& reader = *part.reader;
        const Tile tile = tile_at(job, budget.tile_bytes, item - part.first_item);
        try {
            const Work kind = work_of(job);
            if (kind == Work::literal)
                return put(part.file, job.target_offset + tile.first, job.literal.data() + tile.first, tile.count);
            Buffers& b = pool.of(worker);
            const std::uint64_t target_row = by_row(job) ? row_bytes(job.target_type, job.row_elements) : 1;
            const std::uint64_t source_row = by_row(job) ? row_bytes(job.source_type, job.row_elements) : 1;
            const std::uint64_t offset = job.target_offset + tile.first * target_row;
            // The place in the buffer agrees with the place in the file, so that direct I/O can write from here.
            std::byte* target = b.target.get() + offset % 4096;
            std::byte* source = by_row(job) ? b.source.get() : target;
            const std::uint64_t nbytes = tile.count * source_row;
            if (kind == Work::merge) {
                const auto& group = job.merge->groups[tile.first / job.merge->slice_rows];
                merge_tile(job, tile.first, tile.count, reader, b, target, cancel);
                read.fetch_add(group.size() * nbytes, std::memory_order_relaxed);
                if (group.size() > 1 || job.source_type != job.target_type)
                    encoded.fetch_add(tile.count * job.row_elements, std::memory_order_relaxed);
            } else {
                reader.read_at(tile.first * source_row, {source, nbytes});
                read.fetch_add(nbytes, std::memory_order_relaxed);
            }
            if (kind == Work::remap) remap_tile(job, source, target, nbytes);
            if (kind == Work::encode) {
                encode_tile(job, job.source_type, tile.first, tile.count, source, b, target, cancel);
                encoded.fetch_add(tile.count * job.row_elements, std::memory_order_relaxed);
            }
            cancel.check();
            put(part.file, offset, target, tile.count * target_row);
        } catch (Error& e) {
            if (e.object.empty()) e.object = job.name;
            throw;
        }
    };
    parallel_for(budget.threads, layout.items, cancel, work, [&] {
        if (poll) poll(done.load(std::memory_order_relaxed), layout.total_bytes);
    });
    for (const auto& s : sources) s->check_unchanged();
    sinks.commit();
    return {read, done, encoded, budget.buffer_bytes, budget.threads};
}

}  // namespace pgs
