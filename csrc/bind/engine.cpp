#include "bind/bind.hpp"

#include <algorithm>

#include "engine/engine.hpp"
#include "engine/reduce.hpp"
#include "quant/dispatch.hpp"
#include "quant/rows.hpp"

namespace {

using FloatRows = py::array_t<float, py::array::c_style | py::array::forcecast>;
using RunRows = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;

using Order = py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>;
// slice_rows, columns, orders, groups of (slice, order, weight)
using PyMerge = std::tuple<std::uint64_t, bool, std::vector<Order>,
                           std::vector<std::vector<std::tuple<std::uint32_t, std::uint32_t, float>>>>;

pgs::Job make_job(
    std::string name, std::int32_t source_type, std::int32_t target_type, std::uint64_t row_elements,
    std::uint64_t rows, std::uint64_t target_offset, const std::optional<RunRows>& runs,
    const std::optional<py::bytes>& literal, const std::optional<FloatRows>& importance,
    const std::optional<RunRows>& importance_rows, const std::optional<FloatRows>& importance_divisors,
    const std::optional<std::tuple<std::vector<std::int32_t>, std::vector<std::int32_t>, std::uint64_t>>& remap,
    const std::optional<std::vector<std::vector<std::pair<std::uint64_t, std::uint32_t>>>>& importance_parts,
    const std::optional<PyMerge>& merge, std::uint32_t file, bool best) {
    pgs::Job job;
    if (merge) {
        const auto& [slice_rows, columns, orders, groups] = *merge;
        job.merge = pgs::Merge{slice_rows, columns, {}, {}};
        for (const Order& order : orders) job.merge->orders.emplace_back(order.data(), order.data() + order.size());
        for (const auto& group : groups) {
            auto& parts = job.merge->groups.emplace_back();
            for (const auto& [slice, order, weight] : group) parts.push_back({slice, order, weight});
        }
    }
    job.best = best;
    job.name = std::move(name);
    job.file = file;
    job.source_type = source_type;
    job.target_type = target_type;
    job.row_elements = row_elements;
    job.rows = rows;
    job.target_offset = target_offset;
    pgs::resolve_sizes(job);
    if (runs) {
        if (runs->ndim() != 2 || runs->shape(1) != 3) throw py::value_error("runs must have shape (n, 3)");
        auto r = runs->unchecked<2>();
        for (py::ssize_t i = 0; i < r.shape(0); ++i) {
            if (r(i, 0) > UINT32_MAX) throw py::value_error("source index out of range");
            job.runs.push_back({static_cast<std::uint32_t>(r(i, 0)), r(i, 1), r(i, 2)});
        }
    }
    if (literal) job.literal = std::string(*literal);
    if (importance) {
        if (importance->ndim() != 2) throw py::value_error("importance must have two dimensions");
        if (static_cast<std::uint64_t>(importance->shape(1)) != row_elements)
            throw pgs::Error(pgs::Kind::bad_plan, "importance does not fit the rows").on(job.name);
        job.importance.assign(importance->data(), importance->data() + importance->size());
        try {
            pgs::check_importance(job.importance.data(), importance->shape(0), row_elements);
        } catch (pgs::Error& e) {
            e.object = job.name;
            throw;
        }
    }
    if (importance_rows) {
        if (importance_rows->ndim() != 2 || importance_rows->shape(1) != 2 || importance_rows->shape(0) == 0)
            throw py::value_error("importance_rows must have shape (g, 2)");
        auto r = importance_rows->unchecked<2>();
        for (py::ssize_t i = 0; i < r.shape(0); ++i)
            job.importance_rows.push_back({r(i, 0), r(i, 1), 1, pgs::Merge::as_is, {}});
    } else if (importance) {
        for (py::ssize_t i = 0; i < importance->shape(0); ++i)
            job.importance_rows.push_back(
                {pgs::ImportanceRow::in_memory, static_cast<std::uint64_t>(i), 1, pgs::Merge::as_is, {}});
    }
    if (importance_divisors) {
        const std::size_t n = job.importance_rows.size();
        if (importance_divisors->ndim() != 1 || static_cast<std::size_t>(importance_divisors->size()) != n)
            throw py::value_error("importance_divisors must have shape (g,)");
        for (std::size_t i = 0; i < n; ++i) job.importance_rows[i].divisor = importance_divisors->data()[i];
    }
    if (importance_parts) {
        if (importance_parts->size() != job.importance_rows.size())
            throw py::value_error("importance_parts must have an entry for each of importance_rows");
        for (std::size_t i = 0; i < importance_parts->size(); ++i) {
            auto& row = job.importance_rows[i];
            const auto& parts = (*importance_parts)[i];
            if (!parts.empty()) row.order = parts[0].second;
            for (std::size_t j = 1; j < parts.size(); ++j) row.more.push_back({parts[j].first, parts[j].second});
        }
    }
    if (remap) job.remap = pgs::Remap{std::get<0>(*remap), std::get<1>(*remap), std::get<2>(*remap)};
    return job;
}

std::vector<std::shared_ptr<pgs::Source>> sources_of(const std::vector<PySource*>& sources) {
    std::vector<std::shared_ptr<pgs::Source>> out;
    for (const PySource* s : sources) {
        if (!s) throw py::type_error("a source is None");
        s->get();
        out.push_back(s->source);
    }
    return out;
}

// Shared, not borrowed: the caller's list may lose them during the run.
pgs::Jobs jobs_of(const std::vector<std::shared_ptr<pgs::Job>>& jobs) {
    if (std::find(jobs.begin(), jobs.end(), nullptr) != jobs.end()) throw py::type_error("a job is None");
    return {jobs.begin(), jobs.end()};
}

// Ctrl-C and the caller's callable, from the thread that called; an exception of either cancels the run.
std::function<void(std::uint64_t, std::uint64_t)> poller(const py::object& progress) {
    return [&progress](std::uint64_t done, std::uint64_t total) {
        py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals()) throw py::error_already_set();
        if (!progress.is_none()) progress(done, total);
    };
}

py::dict run(const std::vector<PySource*>& py_sources,
             const std::vector<std::tuple<py::object, py::bytes, std::uint64_t>>& py_outputs,
             const std::vector<std::shared_ptr<pgs::Job>>& py_jobs, std::uint64_t memory, int threads,
             const std::string& io, bool overwrite, const py::object& progress) {
    const auto sources = sources_of(py_sources);
    const auto jobs = jobs_of(py_jobs);
    std::vector<pgs::Output> outputs;
    for (const auto& [path, header, file_bytes] : py_outputs) outputs.push_back({path_bytes(path), header, file_bytes});
    const pgs::RunOptions options{memory, threads, pgs::io_from_name(io), overwrite};
    const auto poll = poller(progress);
    pgs::Cancel cancel;
    pgs::RunStats stats;
    pgs::choose_kernels();
    {
        py::gil_scoped_release release;
        stats = pgs::run(sources, outputs, jobs, options, cancel, poll);
    }
    py::dict d;
    d["bytes_read"] = stats.bytes_read;
    d["bytes_written"] = stats.bytes_written;
    d["elements_encoded"] = stats.elements_encoded;
    d["buffer_bytes"] = stats.buffer_bytes;
    d["threads"] = stats.threads;
    return d;
}

py::array_t<double> reduce_rows(
    const std::vector<PySource*>& py_sources, const pgs::Job& job, std::uint64_t rows_per_group,
    const std::optional<py::array_t<double, py::array::c_style | py::array::forcecast>>& py_weights,
    std::uint64_t memory, int threads, const std::string& io, const py::object& progress) {
    std::vector<double> weights;
    if (py_weights) weights.assign(py_weights->data(), py_weights->data() + py_weights->size());
    const auto sources = sources_of(py_sources);
    const pgs::RunOptions options{memory, threads, pgs::io_from_name(io), false};
    const auto poll = poller(progress);
    pgs::Cancel cancel;
    std::vector<double> sums;
    pgs::choose_kernels();
    {
        py::gil_scoped_release release;
        sums = pgs::reduce_rows(sources, job, rows_per_group, weights, options, cancel, poll);
    }
    py::array_t<double> out({static_cast<py::ssize_t>(sums.size() / 2), py::ssize_t{2}});
    std::copy(sums.begin(), sums.end(), out.mutable_data());
    return out;
}

}  // namespace

void bind_engine(py::module_& m) {
    py::class_<pgs::Job, std::shared_ptr<pgs::Job>>(m, "Job")
        .def(py::init(&make_job), py::arg("name"), py::kw_only(), py::arg("source_type"), py::arg("target_type"),
             py::arg("row_elements"), py::arg("rows"), py::arg("target_offset"), py::arg("runs") = py::none(),
             py::arg("literal") = py::none(), py::arg("importance") = py::none(),
             py::arg("importance_rows") = py::none(), py::arg("importance_divisors") = py::none(),
             py::arg("remap") = py::none(), py::arg("importance_parts") = py::none(), py::arg("merge") = py::none(),
             py::arg("file") = 0, py::arg("best") = false)
        .def_readonly("name", &pgs::Job::name)
        .def_readonly("target_offset", &pgs::Job::target_offset)
        .def_readonly("target_bytes", &pgs::Job::target_bytes);
    m.attr("FILL") = pgs::Run::fill;
    m.attr("AS_IS") = pgs::Merge::as_is;
    m.attr("IN_MEMORY") = pgs::ImportanceRow::in_memory;
    m.def("thread_count", &pgs::thread_count, py::arg("asked"));
    m.def(
        "plan_budget",
        [](const std::vector<std::shared_ptr<pgs::Job>>& jobs, std::uint64_t memory, int threads,
           const std::string& io) {
            const auto b = pgs::plan_budget(jobs_of(jobs), {memory, threads, pgs::io_from_name(io), false});
            py::dict d;
            d["threads"] = b.threads;
            d["tile_bytes"] = b.tile_bytes;
            d["buffer_bytes"] = b.buffer_bytes;
            return d;
        },
        py::arg("jobs"), py::kw_only(), py::arg("memory"), py::arg("threads"), py::arg("io"));
    m.def("run", &run, py::arg("sources"), py::arg("outputs"), py::arg("jobs"), py::kw_only(), py::arg("memory"),
          py::arg("threads"), py::arg("io"), py::arg("overwrite"), py::arg("progress"));
    m.def("reduce_rows", &reduce_rows, py::arg("sources"), py::arg("job"), py::arg("rows_per_group"), py::kw_only(),
          py::arg("weights") = py::none(), py::arg("memory"), py::arg("threads"), py::arg("io"),
          py::arg("progress") = py::none());
}
