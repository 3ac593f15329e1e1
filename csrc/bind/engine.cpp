#include "bind/bind.hpp"

#include <algorithm>

#include "engine/engine.hpp"
#include "engine/reduce.hpp"
#include "quant/dispatch.hpp"
#include "quant/rows.hpp"

namespace {

constexpr auto array_style = py::array::c_style | py::array::forcecast;
using FloatRow = py::array_t<float, array_style>;
using Order = py::array_t<std::uint32_t, array_style>;
using Jobs = std::vector<std::shared_ptr<pgs::Job>>;

pgs::Merge make_merge(std::uint64_t slice_rows, std::vector<std::vector<pgs::Merge::Member>> groups,
                      const std::vector<Order>& orders, bool columns) {
    pgs::Merge merge{slice_rows, columns, {}, std::move(groups)};
    for (const Order& order : orders) merge.orders.emplace_back(order.data(), order.data() + order.size());
    return merge;
}

pgs::ImportanceRow held_row(const FloatRow& values, float divisor) {
    pgs::ImportanceRow row;
    row.held = std::make_shared<const std::vector<float>>(values.data(), values.data() + values.size());
    row.divisor = divisor;
    return row;
}

pgs::ImportanceRow summed_row(std::uint32_t source,
                              const std::vector<std::pair<std::uint64_t, std::optional<std::uint32_t>>>& parts,
                              float divisor) {
    pgs::ImportanceRow row{source, {}, nullptr, divisor};
    for (const auto& [offset, order] : parts) row.parts.push_back({offset, order});
    return row;
}

std::shared_ptr<pgs::Job> make_job(std::string name, std::int32_t source_type, std::int32_t target_type,
                                   std::uint64_t row_elements, std::uint64_t rows, std::uint64_t target_offset,
                                   std::vector<pgs::Run> runs, std::string literal,
                                   std::vector<pgs::ImportanceRow> importance_rows, std::optional<pgs::Remap> remap,
                                   std::optional<pgs::Merge> merge, std::uint32_t file, bool best) {
    auto job = std::make_shared<pgs::Job>();
    job->name = std::move(name);
    job->file = file;
    job->source_type = source_type;
    job->target_type = target_type;
    job->row_elements = row_elements;
    job->rows = rows;
    job->runs = std::move(runs);
    job->literal = std::move(literal);
    job->target_offset = target_offset;
    job->importance_rows = std::move(importance_rows);
    job->best = best;
    job->remap = std::move(remap);
    job->merge = std::move(merge);
    pgs::complete(*job);
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
pgs::Jobs jobs_of(const Jobs& jobs) {
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
             const std::vector<std::tuple<py::object, py::bytes, std::uint64_t>>& py_outputs, const Jobs& py_jobs,
             std::uint64_t memory, int threads, const std::string& io, bool overwrite, const py::object& progress) {
    const auto sources = sources_of(py_sources);
    const auto jobs = jobs_of(py_jobs);
    std::vector<pgs::Output> outputs;
    outputs.reserve(py_outputs.size());
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
    std::ranges::copy(sums, out.mutable_data());
    return out;
}

py::dict plan_budget(const Jobs& jobs, std::uint64_t memory, int threads, const std::string& io) {
    const auto budget = pgs::plan_budget(jobs_of(jobs), {memory, threads, pgs::io_from_name(io), false});
    py::dict d;
    d["threads"] = budget.threads;
    d["tile_bytes"] = budget.tile_bytes;
    d["buffer_bytes"] = budget.buffer_bytes;
    return d;
}

void bind_job(py::module_& m) {
    py::class_<pgs::Run>(m, "Run", "Bytes of a source file, or one value over and over.")
        .def(py::init([](std::uint32_t source, std::uint64_t offset, std::uint64_t nbytes) {
                 return pgs::Run{source, offset, nbytes, 0};
             }),
             py::arg("source"), py::arg("offset"), py::arg("nbytes"))
        .def_static(
            "fill", [](float value, std::uint64_t nbytes) { return pgs::Run{std::nullopt, 0, nbytes, value}; },
            py::arg("value"), py::arg("nbytes"))
        .def_readonly("source", &pgs::Run::source)
        .def_readonly("offset", &pgs::Run::offset)
        .def_readonly("nbytes", &pgs::Run::nbytes)
        .def_readonly("value", &pgs::Run::value);

    py::class_<pgs::Remap>(m, "Remap", "New ids of experts.")
        .def(py::init([](std::vector<std::int32_t> table, std::vector<std::int32_t> substitutes, std::uint64_t column) {
                 return pgs::Remap{std::move(table), std::move(substitutes), column};
             }),
             py::arg("table"), py::arg("substitutes"), py::arg("column"));

    py::class_<pgs::Merge::Member>(m, "Member", "An expert of a group that is merged.")
        .def(py::init([](std::uint32_t slice, float weight, std::optional<std::uint32_t> order) {
                 return pgs::Merge::Member{slice, weight, order};
             }),
             py::arg("slice"), py::arg("weight") = 1.0f, py::arg("order") = py::none());

    py::class_<pgs::Merge>(m, "Merge", "Groups of experts, each of which becomes one.")
        .def(py::init(&make_merge), py::arg("slice_rows"), py::arg("groups"), py::kw_only(),
             py::arg("orders") = std::vector<Order>{}, py::arg("columns") = false);

    py::class_<pgs::ImportanceRow>(m, "ImportanceRow", "One row of importance, in a source file or in memory.")
        .def(py::init([](std::uint32_t source, std::uint64_t offset, float divisor) {
                 return pgs::ImportanceRow{source, {{offset, std::nullopt}}, nullptr, divisor};
             }),
             py::arg("source"), py::arg("offset"), py::kw_only(), py::arg("divisor") = 1.0f)
        .def_static("held", &held_row, py::arg("values"), py::kw_only(), py::arg("divisor") = 1.0f)
        .def_static("sum", &summed_row, py::arg("source"), py::arg("parts"), py::kw_only(), py::arg("divisor") = 1.0f);

    py::class_<pgs::Job, std::shared_ptr<pgs::Job>>(m, "Job", "One output tensor.")
        .def(py::init(&make_job), py::arg("name"), py::kw_only(), py::arg("source_type"), py::arg("target_type"),
             py::arg("row_elements"), py::arg("rows"), py::arg("target_offset"),
             py::arg("runs") = std::vector<pgs::Run>{}, py::arg("literal") = py::bytes(),
             py::arg("importance_rows") = std::vector<pgs::ImportanceRow>{}, py::arg("remap") = py::none(),
             py::arg("merge") = py::none(), py::arg("file") = 0, py::arg("best") = false)
        .def_readonly("name", &pgs::Job::name)
        .def_readonly("target_offset", &pgs::Job::target_offset)
        .def_readonly("target_bytes", &pgs::Job::target_bytes);
}

}  // namespace

void bind_engine(py::module_& m) {
    bind_job(m);
    m.def("thread_count", &pgs::thread_count, py::arg("asked"));
    m.def("plan_budget", &plan_budget, py::arg("jobs"), py::kw_only(), py::arg("memory"), py::arg("threads"),
          py::arg("io"));
    m.def("run", &run, py::arg("sources"), py::arg("outputs"), py::arg("jobs"), py::kw_only(), py::arg("memory"),
          py::arg("threads"), py::arg("io"), py::arg("overwrite"), py::arg("progress"));
    m.def("reduce_rows", &reduce_rows, py::arg("sources"), py::arg("job"), py::arg("rows_per_group"), py::kw_only(),
          py::arg("weights") = py::none(), py::arg("memory"), py::arg("threads"), py::arg("io"),
          py::arg("progress") = py::none());
}
