// What the binding files share. Each adds its room's names to the module; module.cpp is the list.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <string_view>

#include "base/error.hpp"
#include "io/source.hpp"

namespace py = pybind11;

// The Python class Source: a pgs::Source that can be closed early.
struct PySource {
    std::shared_ptr<pgs::Source> source;
    std::shared_ptr<pgs::Mapping> mapping;  // made by the first view

    pgs::Source& get() const {
        if (!source) throw py::value_error("the model is closed");
        return *source;
    }
};

// str, bytes or os.PathLike, as open() takes them.
std::string path_bytes(const py::object& path);

// Text, whose bytes that are not UTF-8 travel through Python as lone surrogates.
py::str text_of(std::string_view bytes);
std::string bytes_of(py::handle text);

void bind_errors(py::module_& m);
void bind_value(py::module_& m);   // Value
void bind_gguf(py::module_& m);    // TensorInfo, Header, read_header, encode_header
void bind_io(py::module_& m);      // Source, Sink
void bind_quant(py::module_& m);   // types, quantize, dequantize
void bind_engine(py::module_& m);  // Job, plan_budget, run, reduce_rows
void bind_stop(py::module_& m);    // StopFlag
