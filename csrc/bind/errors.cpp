#include "bind/bind.hpp"

#include "base/error.hpp"

namespace {

// The Python class of each kind; Kind::os becomes the OSError subclass of its errno (FileNotFoundError, ...).
const char* class_name(pgs::Kind kind) {
    switch (kind) {
        case pgs::Kind::bad_file: return "BadFile";
        case pgs::Kind::bad_plan: return "BadPlan";
        case pgs::Kind::unsupported: return "Unsupported";
        case pgs::Kind::source_changed: return "SourceChanged";
        case pgs::Kind::out_of_space: return "OutOfSpace";
        case pgs::Kind::os: return nullptr;
        case pgs::Kind::cancelled: return "SurgeryError";
    }
    return "SurgeryError";
}

void raise(const pgs::Error& e) {
    auto text = [](const std::string& s) -> py::object {
        if (s.empty()) return py::none();
        return py::reinterpret_steal<py::object>(
            PyUnicode_DecodeUTF8(s.data(), static_cast<Py_ssize_t>(s.size()), "surrogateescape"));
    };
    const char* name = class_name(e.kind);
    if (!name) {
        const std::string problem = e.hint.empty() ? e.problem : e.problem + "; " + e.hint;
        py::object error = py::module_::import("builtins").attr("OSError")(e.os_errno, text(problem), text(e.path));
        PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
        return;
    }
    py::dict fields;
    fields["path"] = text(e.path);
    fields["object"] = text(e.object);
    fields["offset"] = e.offset ? py::object(py::int_(*e.offset)) : py::object(py::none());
    fields["found"] = text(e.found);
    fields["expected"] = text(e.expected);
    fields["hint"] = text(e.hint);
    if (e.kind == pgs::Kind::out_of_space) fields["errno"] = e.os_errno;
    py::object error = py::module_::import("pygguf_surgery.base.errors").attr(name)(text(e.problem), **fields);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

}  // namespace

void bind_errors(py::module_&) {
    // NOLINTNEXTLINE(performance-unnecessary-value-param): the signature that pybind11 wants
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const pgs::Error& e) {
            raise(e);
        }
    });
}
