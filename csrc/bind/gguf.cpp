// Headers of files.
#include "bind/bind.hpp"

#include <utility>

#include "base/error.hpp"
#include "gguf/header.hpp"
#include "quant/types.hpp"

namespace {

using pgs::Error;
using pgs::Kind;
using pgs::TensorInfo;
using pgs::Value;

std::vector<std::uint64_t> dims_from(const py::iterable& ne) {
    std::vector<std::uint64_t> dims;
    for (py::handle item : ne) {
        const auto n = py::reinterpret_steal<py::object>(PyNumber_Index(item.ptr()));  // numpy integers too
        if (!n) throw py::error_already_set();
        const auto dim = PyLong_AsUnsignedLongLong(n.ptr());
        if (PyErr_Occurred()) {
            PyErr_Clear();
            throw Error(Kind::bad_plan, "dimension out of range").got(py::str(n)).want("0..2^63-1");
        }
        dims.push_back(dim);
    }
    return dims;
}

TensorInfo make_tensor(const py::str& name, const py::iterable& ne, std::int32_t type) {
    TensorInfo tensor;
    tensor.name = bytes_of(name);
    tensor.ne = dims_from(ne);
    tensor.type = type;
    return tensor;
}

// A pgs::Header whose metadata and tensors live as Python objects, once.
struct PyHeader {
    std::uint32_t version;
    std::uint64_t alignment, data_offset;
    py::list metadata, tensors, warnings;
};

PyHeader read_header(const PySource& source, bool strict, bool metadata_only) {
    const std::shared_ptr<pgs::Source> held = (source.get(), source.source);  // another thread may close it meanwhile
    pgs::Header header;
    {
        py::gil_scoped_release unlocked;
        header = pgs::read_header(*held, pgs::type_table(), {.strict = strict, .metadata_only = metadata_only});
    }
    PyHeader out{header.version, header.alignment, header.data_offset, py::list(), py::list(), py::list()};
    for (auto& [key, value] : header.metadata) out.metadata.append(py::make_tuple(text_of(key), std::move(value)));
    for (auto& tensor : header.tensors) out.tensors.append(std::move(tensor));
    for (const auto& warning : header.warnings) out.warnings.append(text_of(warning));
    return out;
}

py::tuple encode_header(const py::iterable& metadata, const py::sequence& tensors, std::uint64_t alignment) {
    std::vector<std::pair<std::string, Value>> pairs;
    for (py::handle item : metadata) {
        const auto pair = py::cast<py::tuple>(item);
        if (pair.size() != 2) throw py::value_error("metadata must be (key, Value) pairs");
        pairs.emplace_back(bytes_of(py::cast<py::str>(pair[0])), py::cast<const Value&>(pair[1]));
    }
    std::vector<TensorInfo> infos;
    for (py::handle item : tensors) infos.push_back(py::cast<const TensorInfo&>(item));
    const auto encoded = pgs::encode_header(pairs, infos, alignment, pgs::type_table());
    for (std::size_t i = 0; i < infos.size(); ++i) {
        const py::object item = tensors[i];
        auto& tensor = py::cast<TensorInfo&>(item);
        tensor.offset = infos[i].offset;
        tensor.nbytes = infos[i].nbytes;
    }
    return py::make_tuple(py::bytes(encoded.bytes), encoded.offsets, encoded.file_bytes);
}

void bind_tensor_info(py::module_& m) {
    py::class_<TensorInfo>(m, "TensorInfo", "A tensor in a header; ne is ggml's order, fastest first.")
        .def(py::init(&make_tensor), py::arg("name"), py::arg("ne"), py::arg("type"))
        .def_property(
            "name", [](const TensorInfo& t) { return text_of(t.name); },
            [](TensorInfo& t, const py::str& name) { t.name = bytes_of(name); })
        .def_property(
            "ne", [](const TensorInfo& t) { return py::tuple(py::cast(t.ne)); },
            [](TensorInfo& t, const py::iterable& ne) { t.ne = dims_from(ne); })
        .def_readwrite("type", &TensorInfo::type)
        .def_readwrite("offset", &TensorInfo::offset)
        .def_readwrite("nbytes", &TensorInfo::nbytes)
        .def("__repr__",
             [](const TensorInfo& t) {
                 return py::str("TensorInfo({!r}, {}, {})").format(text_of(t.name), py::tuple(py::cast(t.ne)), t.type);
             })
        .def(py::pickle(
            [](const TensorInfo& t) {
                return py::make_tuple(text_of(t.name), py::tuple(py::cast(t.ne)), t.type, t.offset, t.nbytes);
            },
            [](const py::tuple& state) {
                auto t = make_tensor(py::cast<py::str>(state[0]), py::cast<py::tuple>(state[1]),
                                     py::cast<std::int32_t>(state[2]));
                t.offset = py::cast<std::uint64_t>(state[3]);
                t.nbytes = py::cast<std::uint64_t>(state[4]);
                return t;
            }));
}

}  // namespace

void bind_gguf(py::module_& m) {
    bind_tensor_info(m);
    py::class_<PyHeader>(m, "Header", "What read_header found.")
        .def_readonly("version", &PyHeader::version)
        .def_readonly("alignment", &PyHeader::alignment)
        .def_readonly("data_offset", &PyHeader::data_offset)
        .def_readonly("metadata", &PyHeader::metadata)
        .def_readonly("tensors", &PyHeader::tensors)
        .def_readonly("warnings", &PyHeader::warnings);
    m.def("read_header", &read_header, py::arg("source"), py::kw_only(), py::arg("strict") = false,
          py::arg("metadata_only") = false, "Parse the header of a GGUF file; no tensor data is read.");
    m.def("encode_header", &encode_header, py::arg("metadata"), py::arg("tensors"), py::arg("alignment"),
          "(header bytes with padding, absolute offset of each tensor, bytes of the whole file).");
}
