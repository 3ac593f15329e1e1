#include "engine/reduce.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/checked.hpp"
#include "base/error.hpp"
#include "io/sys.hpp"
#include "quant/rows.hpp"

namespace pgs {

namespace {

// Eight running sums, element j into sum j % 8, combined in one fixed order: vectorizes without changing a bit between
// machines.
struct Sums {
    double absolute = 0, square = 0;
};
// weights: of each column in the sum of squares, or null for ones.
Sums row_sums(const float* x, std::uint64_t n, const double* weights) {
    double a[8] = {}, s[8] = {};
    std::uint64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; ++j) {
            const auto v = static_cast<double>(x[i + static_cast<std::uint64_t>(j)]);
            a[j] += std::fabs(v);
            s[j] += weights ? v * v * weights[i + static_cast<std::uint64_t>(j)] : v * v;
        }
    for (int j = 0; i < n; ++i, ++j) {
        const auto v = static_cast<double>(x[i]);
        a[j] += std::fabs(v);
        s[j] += weights ? v * v * weights[i] : v * v;
    }
    return {((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])),
            ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))};
}

}  // namespace

std::vector<double> reduce_rows(const std::vector<std::shared_ptr<Source>>& inputs, const Job& job,
                                std::uint64_t rows_per_group, const std::vector<double>& weights,
                                const RunOptions& options, Cancel& cancel,
                                const std::function<void(std::uint64_t, std::uint64_t)>& poll) {
    check_job(job, inputs);
    if (rows_per_group == 0 || job.rows % rows_per_group)
        throw Error(Kind::bad_plan, "groups do not divide the rows").on(job.name);
    const TypeFacts& type = type_facts(job.source_type);
    if (!type.decodes) throw Error(Kind::unsupported, "no decoder for this type").on(job.name).got(type.name);
    const Decoder decoder(type, job.row_elements);
    const auto sources = reopen_sources(inputs, options.io);
    const RunReader reader(job, sources);
    const std::uint64_t groups = job.rows / rows_per_group;
    if (!weights.empty() && checked_mul<std::uint64_t>(groups, job.row_elements) != weights.size())
        throw Error(Kind::bad_plan, "weights do not fit the groups").on(job.name);
    const std::uint64_t source_row = job.source_row_bytes;

    // A group is summed by one worker, in order; small groups (router rows) are handed out many at a time.
    const std::uint64_t chunk = std::min(job.rows, chunk_rows(job.row_elements));
    const std::uint64_t floats_bytes = chunk * job.row_elements * sizeof(float);
    auto rows_of = [&](std::uint64_t tile_bytes) {
        return std::max<std::uint64_t>(1, tile_bytes / std::max<std::uint64_t>(1, source_row));
    };
    const Budget budget = fit_budget(options, job.name, weights.size() * sizeof(double), [&](std::uint64_t tile_bytes) {
        return std::min(job.rows, rows_of(tile_bytes)) * source_row + floats_bytes;
    });
    const std::uint64_t step = rows_of(budget.tile_bytes);
    const std::uint64_t batch = std::max<std::uint64_t>(1, step / rows_per_group);
    const std::uint64_t piece = std::min({step, rows_per_group * batch, job.rows});

    struct Buffers {
        PageBuffer source, floats;
    };
    std::vector<std::unique_ptr<Buffers>> pool(static_cast<std::size_t>(budget.threads));
    std::vector<double> result(groups * 2);
    std::atomic<std::uint64_t> done{0};
    auto work = [&](int worker, std::uint64_t item) {
        auto& b = pool[static_cast<std::size_t>(worker)];
        if (!b) b = std::make_unique<Buffers>(Buffers{page_buffer(piece * source_row), page_buffer(floats_bytes)});
        auto* floats = reinterpret_cast<float*>(b->floats.get());
        const std::uint64_t begin = item * batch * rows_per_group;
        const std::uint64_t end = std::min(job.rows, begin + batch * rows_per_group);
        for (std::uint64_t at = begin; at < end; at += piece) {
            const std::uint64_t rows = std::min(piece, end - at);
            reader.read_at(at * source_row, {b->source.get(), rows * source_row});
            for (std::uint64_t row = 0; row < rows; row += chunk) {
                cancel.check();
                const std::uint64_t n = std::min(chunk, rows - row);
                decoder.decode(b->source.get() + row * source_row, floats, n);
                for (std::uint64_t i = 0; i < n; ++i) {
                    const std::uint64_t group = (at + row + i) / rows_per_group;
                    const Sums sums = row_sums(floats + i * job.row_elements, job.row_elements,
                                               weights.empty() ? nullptr : weights.data() + group * job.row_elements);
                    result[group * 2] += sums.absolute;
                    result[group * 2 + 1] += sums.square;
                }
            }
            done.fetch_add(rows * source_row, std::memory_order_relaxed);
        }
    };
    const std::uint64_t total = job.rows * source_row;
    parallel_for(budget.threads, (groups + batch - 1) / batch, cancel, work, [&] {
        if (poll) poll(done.load(std::memory_order_relaxed), total);
    });
    for (const auto& s : sources) s->check_unchanged();
    return result;
}

}  // namespace pgs
