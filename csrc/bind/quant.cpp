#include "bind/bind.hpp"

#include <optional>

#include "quant/arrays.hpp"
#include "quant/dispatch.hpp"
#include "quant/rows.hpp"

namespace {

constexpr auto array_style = py::array::c_style | py::array::forcecast;

py::list types() {
    py::list out;
    for (const pgs::TypeFacts& facts : pgs::type_table())
        if (!facts.name.empty()) out.append(py::cast(&facts, py::return_value_policy::reference));
    return out;
}

// Ctrl-C, heard while threads work without the GIL.
void poll_signals() {
    py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals()) throw py::error_already_set();
}

using FloatArray = py::array_t<float, array_style>;
using ByteArray = py::array_t<std::uint8_t, array_style>;

py::array_t<std::uint8_t> quantize(const FloatArray& rows, std::int32_t type,
                                   const std::optional<FloatArray>& importance, int threads, bool best) {
    const pgs::TypeFacts& facts = pgs::type_facts(type);
    if (rows.ndim() != 2) throw py::value_error("rows must have two dimensions");
    const pgs::RowsOf shape{static_cast<std::uint64_t>(rows.shape(0)), static_cast<std::uint64_t>(rows.shape(1))};
    if (shape.row_elements % facts.block)
        throw pgs::Error(pgs::Kind::bad_plan, "row length is not a multiple of the block")
            .got(std::to_string(shape.row_elements))
            .want("a multiple of " + std::to_string(facts.block) + " for " + facts.name);
    std::span<const float> weights;
    if (importance) {
        if (importance->ndim() != 2 || importance->shape(0) == 0 || importance->shape(1) != rows.shape(1))
            throw py::value_error("importance must have shape (groups, row length)");
        weights = {importance->data(), static_cast<std::size_t>(importance->size())};
    }
    py::array_t<std::uint8_t> out({shape.rows, pgs::row_bytes(facts, shape.row_elements)});
    const float* source = rows.data();
    auto* target = reinterpret_cast<std::byte*>(out.mutable_data());
    pgs::choose_kernels();
    py::gil_scoped_release release;
    pgs::Cancel cancel;
    pgs::quantize_rows(facts, shape, source, weights, target, best, threads, cancel, poll_signals);
    return out;
}

py::array_t<float> dequantize(const ByteArray& rows, std::int32_t type, int threads) {
    const pgs::TypeFacts& facts = pgs::type_facts(type);
    if (rows.ndim() != 2) throw py::value_error("rows must have two dimensions");
    const std::uint64_t n = rows.shape(0), bytes = rows.shape(1);
    if (bytes % facts.block_bytes)
        throw pgs::Error(pgs::Kind::bad_plan, "bytes of a row are not a multiple of the block's")
            .got(std::to_string(bytes))
            .want("a multiple of " + std::to_string(facts.block_bytes) + " for " + facts.name);
    const pgs::RowsOf shape{n, bytes / facts.block_bytes * facts.block};
    py::array_t<float> out({shape.rows, shape.row_elements});
    const auto* source = reinterpret_cast<const std::byte*>(rows.data());
    float* target = out.mutable_data();
    pgs::choose_kernels();
    py::gil_scoped_release release;
    pgs::Cancel cancel;
    pgs::dequantize_rows(facts, shape, source, target, threads, cancel, poll_signals);
    return out;
}

std::optional<std::uint64_t> first_invalid_block(const ByteArray& data, std::int32_t type) {
    const pgs::TypeFacts& facts = pgs::type_facts(type);
    const auto* bytes = reinterpret_cast<const std::byte*>(data.data());
    const auto n = static_cast<std::uint64_t>(data.nbytes());
    if (n % facts.block_bytes) throw py::value_error("not whole blocks");
    py::gil_scoped_release release;
    return pgs::first_invalid_block(facts, bytes, n);
}

}  // namespace

void bind_quant(py::module_& m) {
    py::class_<pgs::TypeFacts>(m, "TypeFacts", "What there is to know of a ggml type.")
        .def_readonly("id", &pgs::TypeFacts::id)
        .def_readonly("name", &pgs::TypeFacts::name)
        .def_readonly("block", &pgs::TypeFacts::block)
        .def_readonly("block_bytes", &pgs::TypeFacts::block_bytes)
        .def_readonly("quantized", &pgs::TypeFacts::quantized)
        .def_readonly("encodes", &pgs::TypeFacts::encodes)
        .def_readonly("decodes", &pgs::TypeFacts::decodes)
        .def_readonly("needs_importance", &pgs::TypeFacts::needs_importance)
        .def_readonly("uses_importance", &pgs::TypeFacts::uses_importance)
        .def_readonly("has_best", &pgs::TypeFacts::has_best)
        .def("__repr__", [](const pgs::TypeFacts& facts) { return "<TypeFacts " + facts.name + ">"; });
    m.def("types", &types);
    m.def("kernels", [] { return std::string(pgs::choose_kernels().name); });
    m.def("ggml_version", &pgs::ggml_version_text);
    m.def("quantize", &quantize, py::arg("rows"), py::arg("type"), py::arg("importance"), py::arg("threads"),
          py::arg("best") = false);
    m.def("dequantize", &dequantize, py::arg("rows"), py::arg("type"), py::arg("threads"));
    m.def("first_invalid_block", &first_invalid_block, py::arg("data"), py::arg("type"));
}
