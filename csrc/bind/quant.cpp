#include "bind/bind.hpp"

#include <algorithm>

#include "base/parallel.hpp"
#include "quant/lanes/kernels.hpp"
#include "quant/reference.hpp"

namespace {

constexpr auto array_style = py::array::c_style | py::array::forcecast;

py::list types() {
    py::list out;
    const auto& table = pgs::type_table();
    for (std::size_t id = 0; id < table.size(); ++id) {
        if (table[id].name.empty()) continue;
        const auto type = static_cast<std::int32_t>(id);
        py::dict d;
        d["id"] = type;
        d["name"] = table[id].name;
        d["block"] = table[id].block;
        d["block_bytes"] = table[id].block_bytes;
        d["quantized"] = pgs::type_is_quantized(type);
        d["encodes"] = pgs::type_can_encode(type);
        d["decodes"] = pgs::type_can_decode(type);
        d["needs_importance"] = pgs::type_needs_importance(type);
        d["uses_importance"] = pgs::type_uses_importance(type);
        d["has_best"] = pgs::type_has_best(type);
        out.append(d);
    }
    return out;
}

// Chunks of rows big enough to be worth a hand-out, small enough to stay in cache and to stop soon.
std::uint64_t chunk_rows(std::uint64_t row_elements) {
    return std::max<std::uint64_t>(1, 32768 / std::max<std::uint64_t>(1, row_elements));
}

// Runs work(first, count) over [0, rows) on threads, answering Ctrl-C; called with the GIL held.
template <typename Work>
void over_rows(std::uint64_t rows, std::uint64_t chunk, int threads, Work work) {
    threads = pgs::thread_count(threads);
    pgs::choose_kernels();
    py::gil_scoped_release release;
    pgs::Cancel cancel;
    pgs::parallel_for(
        threads, (rows + chunk - 1) / chunk, cancel,
        [&](int, std::uint64_t i) { work(i * chunk, std::min(chunk, rows - i * chunk)); },
        [] {
            py::gil_scoped_acquire acquire;
            if (PyErr_CheckSignals()) throw py::error_already_set();
        });
}

py::array_t<std::uint8_t> quantize(const py::array_t<float, array_style>& rows, std::int32_t type,
                                   const py::object& importance_or_none, int threads, bool best) {
    if (rows.ndim() != 2) throw py::value_error("rows must have two dimensions");
    const std::uint64_t n = rows.shape(0), k = rows.shape(1);
    const auto& facts = pgs::type_table()[type];
    if (facts.block == 0 || k % facts.block)
        throw pgs::Error(pgs::Kind::bad_plan, "row length is no multiple of the block")
            .got(std::to_string(k))
            .want("a multiple of " + std::to_string(facts.block) + " for " + facts.name);
    py::array_t<float, array_style> importance;
    std::uint64_t group = 1;
    const float* weights = nullptr;
    if (!importance_or_none.is_none() && (pgs::type_uses_importance(type) || (best && pgs::type_has_best(type)))) {
        importance = importance_or_none.cast<py::array_t<float, array_style>>();
        const std::uint64_t g = importance.ndim() == 2 ? importance.shape(0) : 0;
        if (importance.ndim() != 2 || static_cast<std::uint64_t>(importance.shape(1)) != k || g == 0 || n % g)
            throw pgs::Error(pgs::Kind::bad_plan, "importance does not fit the rows")
                .on("imatrix")
                .want("(groups, " + std::to_string(k) + ") with groups dividing " + std::to_string(n));
        group = std::max<std::uint64_t>(1, n / g);
        weights = importance.data();
        pgs::check_importance(weights, g, k);
    }
    const std::uint64_t bytes = pgs::row_bytes(type, k);
    py::array_t<std::uint8_t> out({n, bytes});
    const float* source = rows.data();
    auto* target = reinterpret_cast<std::byte*>(out.mutable_data());
    over_rows(n, chunk_rows(k), threads, [&](std::uint64_t first, std::uint64_t count) {
        while (count) {  // a chunk never crosses from one importance row to the next
            const std::uint64_t some = weights ? std::min(count, group - first % group) : count;
            pgs::encode_rows(type, source + first * k, target + first * bytes, some, k,
                             weights ? weights + first / group * k : nullptr, first, best);
            first += some;
            count -= some;
        }
    });
    return out;
}

py::array_t<float> dequantize(const py::array_t<std::uint8_t, array_style>& rows, std::int32_t type, int threads) {
    if (rows.ndim() != 2) throw py::value_error("rows must have two dimensions");
    const std::uint64_t n = rows.shape(0), bytes = rows.shape(1);
    const auto& facts = pgs::type_table()[type];
    if (facts.block == 0 || bytes % facts.block_bytes)
        throw pgs::Error(pgs::Kind::bad_plan, "bytes of a row are no multiple of the block's")
            .got(std::to_string(bytes))
            .want("a multiple of " + std::to_string(facts.block_bytes) + " for " + facts.name);
    const std::uint64_t k = bytes / facts.block_bytes * facts.block;
    py::array_t<float> out({n, k});
    const auto* source = reinterpret_cast<const std::byte*>(rows.data());
    float* target = out.mutable_data();
    over_rows(n, chunk_rows(k), threads, [&](std::uint64_t first, std::uint64_t count) {
        pgs::decode_rows(type, source + first * bytes, target + first * k, count, k);
    });
    return out;
}

std::int32_t checked_type(std::int32_t type) {
    pgs::type_is_quantized(type);  // throws if there is no such type
    return type;
}

}  // namespace

void bind_quant(py::module_& m) {
    m.def("types", &types);
    m.def("type_id", &pgs::type_from_name, py::arg("name"));
    m.def("kernels", [] { return std::string(pgs::choose_kernels().name); });
    m.def("ggml_version", &pgs::ggml_version_text);
    m.def(
        "quantize",
        [](const py::array_t<float, array_style>& rows, std::int32_t type, const py::object& importance, int threads,
           bool best) { return quantize(rows, checked_type(type), importance, threads, best); },
        py::arg("rows"), py::arg("type"), py::arg("importance"), py::arg("threads"), py::arg("best") = false);
    m.def(
        "first_invalid_block",
        [](const py::array_t<std::uint8_t, array_style>& data, std::int32_t type) {
            const auto* bytes = reinterpret_cast<const std::byte*>(data.data());
            const std::uint64_t n = data.nbytes();
            if (n % pgs::type_table()[checked_type(type)].block_bytes) throw py::value_error("not whole blocks");
            py::gil_scoped_release release;
            return pgs::first_invalid_block(type, bytes, n);
        },
        py::arg("data"), py::arg("type"));
    m.def(
        "dequantize",
        [](const py::array_t<std::uint8_t, array_style>& rows, std::int32_t type, int threads) {
            return dequantize(rows, checked_type(type), threads);
        },
        py::arg("rows"), py::arg("type"), py::arg("threads"));
}
