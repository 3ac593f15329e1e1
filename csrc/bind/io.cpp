#include "bind/bind.hpp"

#include "base/error.hpp"
#include "io/sink.hpp"

std::string path_bytes(const py::object& path) {
    PyObject* encoded = nullptr;
    if (!PyUnicode_FSConverter(path.ptr(), static_cast<void*>(&encoded))) throw py::error_already_set();
    return std::string(py::reinterpret_steal<py::bytes>(encoded));
}

namespace {

py::object path_text(const std::string& path) {
    return py::reinterpret_steal<py::object>(
        PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

PySource open_py(const py::object& path, const std::string& io) {
    const std::string name = path_bytes(path);
    const pgs::Io how = pgs::io_from_name(io);
    py::gil_scoped_release release;
    return {pgs::open_source(name, how), nullptr};
}

py::array_t<std::uint8_t> read_bytes(const PySource& self, std::uint64_t offset, std::uint64_t nbytes) {
    self.get().check_range(offset, nbytes);                   // before memory is asked for
    const std::shared_ptr<pgs::Source> source = self.source;  // another thread may close meanwhile
    py::array_t<std::uint8_t> out(static_cast<py::ssize_t>(nbytes));
    std::span<std::byte> bytes(reinterpret_cast<std::byte*>(out.mutable_data()), nbytes);
    py::gil_scoped_release release;
    source->read_at(offset, bytes);
    return out;
}

py::array view_bytes(PySource& self, std::uint64_t offset, std::uint64_t nbytes) {
    const pgs::Source& source = self.get();
    source.check_range(offset, nbytes);
    if (!self.mapping) self.mapping = std::make_shared<pgs::Mapping>(source.path(), source.identity());
    auto owner = std::make_unique<std::shared_ptr<pgs::Mapping>>(self.mapping);
    py::capsule keep(owner.get(), [](void* p) { delete static_cast<std::shared_ptr<pgs::Mapping>*>(p); });
    (void)owner.release();
    py::array_t<std::uint8_t> out({static_cast<py::ssize_t>(nbytes)}, {1},
                                  reinterpret_cast<const std::uint8_t*>(self.mapping->bytes().data()) + offset, keep);
    py::detail::array_proxy(out.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
    return out;
}

// Python's Sink: a pgs::Sink that is gone after commit or abort.
struct PySink {
    std::shared_ptr<pgs::Sink> sink;

    // Without `take` the sink stays open.
    std::shared_ptr<pgs::Sink> get(bool take = false) {
        if (!sink) throw py::value_error("the output is closed");
        return take ? std::move(sink) : sink;
    }
};

PySink create_py(const py::object& path, std::uint64_t size, bool overwrite, const std::string& io,
                 const std::vector<const PySource*>& inputs) {
    pgs::SinkOptions options;
    options.overwrite = overwrite;
    options.io = pgs::io_from_name(io);
    for (const PySource* input : inputs) {
        if (!input) throw py::type_error("an input is None");
        options.inputs.push_back(input->get().identity());
    }
    const std::string name = path_bytes(path);
    py::gil_scoped_release release;
    return {pgs::create_sink(name, size, options)};
}

void write_sink(PySink& self, std::uint64_t offset, const py::object& data) {
    const auto sink = self.get();
    Py_buffer buffer;
    if (PyObject_GetBuffer(data.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    const std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> owner(&buffer, PyBuffer_Release);
    const std::span bytes(static_cast<const std::byte*>(buffer.buf), static_cast<std::size_t>(buffer.len));
    py::gil_scoped_release release;
    sink->write_at(offset, bytes);
}

void commit_sink(PySink& self) {
    auto sink = self.get(true);
    py::gil_scoped_release release;
    sink->commit();
    sink.reset();
}

void abort_sink(PySink& self) {
    auto sink = std::move(self.sink);
    py::gil_scoped_release release;
    sink.reset();
}

}  // namespace

void bind_io(py::module_& m) {
    py::class_<PySource, std::shared_ptr<PySource>>(m, "Source")
        .def(py::init(&open_py), py::arg("path"), py::arg("io") = "pread")
        .def_property_readonly("path", [](const PySource& self) { return path_text(self.get().path()); })
        .def_property_readonly("size", [](const PySource& self) { return self.get().size(); })
        .def_property_readonly("identity",
                               [](const PySource& self) {
                                   const pgs::Identity& id = self.get().identity();
                                   return py::make_tuple(id.device, id.inode, id.size, id.mtime_ns);
                               })
        .def("read", &read_bytes, py::arg("offset"), py::arg("nbytes"))
        .def("view", &view_bytes, py::arg("offset"), py::arg("nbytes"))
        .def("check_unchanged", [](const PySource& self) { self.get().check_unchanged(); })
        .def("close", [](PySource& self) {
            self.source.reset();
            self.mapping.reset();
        });

    py::class_<PySink>(m, "Sink")
        .def(py::init(&create_py), py::arg("path"), py::arg("size"), py::kw_only(), py::arg("overwrite") = false,
             py::arg("io") = "auto", py::arg("inputs") = std::vector<const PySource*>{})
        .def("write_at", &write_sink, py::arg("offset"), py::arg("data"))
        .def("commit", &commit_sink)
        .def("abort", &abort_sink)
        .def(
            "__enter__", [](PySink& self) -> PySink& { return self; }, py::return_value_policy::reference_internal)
        .def("__exit__", [](PySink& self, const py::object& type, const py::object&, const py::object&) {
            if (!self.sink) return;  // committed or aborted by hand
            if (type.is_none())
                commit_sink(self);
            else
                abort_sink(self);
        });
}
