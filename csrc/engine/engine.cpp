#include "engine/engine.hpp"

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <unordered_set>

#include "base/checked.hpp"
#include "base/error.hpp"
#include "engine/buffers.hpp"
#include "engine/work.hpp"
#include "io/sink_set.hpp"

namespace pgs {

namespace {

// A stretch of an output: a job, or padding. Padding is written where its turn comes, since the sink keeps every block
// that is not complete yet.
struct Part {
    const Job* job;
    std::optional<TileMaker> maker;  // none: padding
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
    std::ranges::stable_sort(in_order, [](const Job* a, const Job* b) {
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
                    {&job, TileMaker(job, sources), file, job.target_offset, job.target_bytes, layout.items});
            layout.items += tile_count(job, tile_bytes);
        }
        pad_to(file_bytes);
    }
    return layout;
}

// The outputs in the making, and how much of them is written.
class OutputSet {
public:
    // The headers are the first to be written.
    OutputSet(const std::vector<std::shared_ptr<Source>>& inputs, const std::vector<Output>& outputs,
              const RunOptions& options)
        : outputs_(outputs), sinks_(files_of(outputs), sink_options(inputs, options)), written_(outputs.size()) {
        for (std::size_t file = 0; file < outputs.size(); ++file)
            put(file, 0, outputs[file].header.data(), outputs[file].header.size());
    }

    void put(std::size_t file, std::uint64_t offset, const void* data, std::uint64_t n) {
        sinks_.write_at(file, offset, {static_cast<const std::byte*>(data), n});
        done_.fetch_add(n, std::memory_order_relaxed);
        // A shard that is complete lets go of the page cache now, not when the last one is.
        if (written_[file].fetch_add(n) + n == outputs_[file].file_bytes && n && outputs_.size() > 1)
            sinks_.finish(file);
    }

    void put_zeros(std::size_t file, std::uint64_t offset, std::uint64_t nbytes, const Cancel& cancel) {
        static constexpr char zeros[4096] = {};
        for (std::uint64_t at = 0, n = 0; at < nbytes; at += n) {
            cancel.check();
            n = std::min<std::uint64_t>(nbytes - at, sizeof zeros);
            put(file, offset + at, zeros, n);
        }
    }

    std::uint64_t done() const { return done_.load(std::memory_order_relaxed); }
    void commit() { sinks_.commit(); }

private:
    static std::vector<SinkFile> files_of(const std::vector<Output>& outputs) {
        std::vector<SinkFile> files;
        files.reserve(outputs.size());
        for (const Output& output : outputs) files.push_back({output.path, output.file_bytes});
        return files;
    }
    static SinkOptions sink_options(const std::vector<std::shared_ptr<Source>>& inputs, const RunOptions& options) {
        SinkOptions out{options.overwrite, options.io, {}};
        for (const auto& s : inputs) out.inputs.push_back(s->identity());
        return out;
    }

    const std::vector<Output>& outputs_;
    SinkSet sinks_;
    std::atomic<std::uint64_t> done_{0};
    std::vector<std::atomic<std::uint64_t>> written_;
};

}  // namespace

Budget plan_budget(const Jobs& jobs, const RunOptions& options) {
    const auto longest_row = std::ranges::max_element(
        jobs, [](const auto& a, const auto& b) { return tile_buffers(*a, 0).total() < tile_buffers(*b, 0).total(); });
    // Importance rows in memory and orders are memory that the caller has filled already; they count all the same, once.
    std::uint64_t held = 0;
    std::unordered_set<const void*> counted;
    for (const auto& job : jobs) {
        for (const ImportanceRow& row : job->importance_rows)
            if (row.held && counted.insert(row.held.get()).second) held += row.held->size() * sizeof(float);
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
    OutputSet set(inputs, outputs, options);
    BufferPool pool(budget.threads, largest_buffers(jobs, budget.tile_bytes), sources);
    std::atomic<std::uint64_t> read{0}, encoded{0};

    auto do_item = [&](int worker, std::uint64_t item) {
        const auto after = std::ranges::upper_bound(layout.parts, item, {}, &Part::first_item);
        const Part& part = *std::prev(after);
        if (!part.job) return set.put_zeros(part.file, part.offset, part.nbytes, cancel);
        const Job& job = *part.job;
        const Tile tile = tile_at(job, budget.tile_bytes, item - part.first_item);
        try {
            if (work_of(job) == Work::literal)
                return set.put(part.file, job.target_offset + tile.first, job.literal.data() + tile.first, tile.count);
            Buffers& buffers = pool.of(worker);
            const std::uint64_t target_row = by_row(job) ? job.target_row_bytes : 1;
            const std::uint64_t offset = job.target_offset + tile.first * target_row;
            // The place in the buffer agrees with the place in the file, so that direct I/O can write from here.
            std::byte* const target = buffers.target.get() + offset % 4096;
            const TileWork work = part.maker->make(tile, buffers, target, cancel);
            read.fetch_add(work.bytes_read, std::memory_order_relaxed);
            encoded.fetch_add(work.elements_encoded, std::memory_order_relaxed);
            cancel.check();
            set.put(part.file, offset, target, tile.count * target_row);
        } catch (Error& e) {
            if (e.object.empty()) e.object = job.name;
            throw;
        }
    };
    parallel_for(budget.threads, layout.items, cancel, do_item, [&] {
        if (poll) poll(set.done(), layout.total_bytes);
    });
    for (const auto& s : sources) s->check_unchanged();
    set.commit();
    return {read, set.done(), encoded, budget.buffer_bytes, budget.threads};
}

}  // namespace pgs
