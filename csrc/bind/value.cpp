// Metadata values as Python objects, and back.
#include "bind/bind.hpp"

#include <cmath>
#include <cstring>
#include <utility>

#include "base/error.hpp"
#include "base/words.hpp"
#include "gguf/header.hpp"

py::str text_of(std::string_view bytes) {
    PyObject* text = PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "surrogateescape");
    if (!text) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(text);
}

std::string bytes_of(py::handle text) {
    Py_ssize_t size;
    if (const char* utf8 = PyUnicode_AsUTF8AndSize(text.ptr(), &size)) return {utf8, static_cast<std::size_t>(size)};
    PyErr_Clear();
    auto bytes = py::reinterpret_steal<py::bytes>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogateescape"));
    if (!bytes) {
        PyErr_Clear();
        throw pgs::Error(pgs::Kind::bad_plan, "text cannot be encoded as UTF-8");
    }
    return bytes;
}

namespace {

using pgs::Error;
using pgs::Kind;
using pgs::put_word;
using pgs::Value;
using pgs::ValueType;
using pgs::word_at;

// --- value types: "u16", "u16[]" -------------------------------------------------------------------------------------

struct Form {
    ValueType type = ValueType::u8;  // of the elements, if it is an array
    bool array = false;
};

Form form_from_name(const std::string& name) {
    std::string_view scalar = name;
    Form form;
    if (scalar.ends_with("[]")) {
        form.array = true;
        scalar.remove_suffix(2);
    }
    for (std::uint32_t id = 0; id < pgs::value_type_count; ++id) {
        form.type = static_cast<ValueType>(id);
        if (form.type != ValueType::array && scalar == pgs::value_type_name(form.type)) return form;
    }
    throw Error(Kind::bad_plan, "unknown value type")
        .got("'" + pgs::shown(name) + "'")
        .want("u8 i8 u16 i16 u32 i32 f32 bool str u64 i64 f64, or one of these with []");
}

std::string form_name(const Value& value) {
    if (value.type != ValueType::array) return pgs::value_type_name(value.type);
    return std::string(pgs::value_type_name(value.element)) + "[]";
}

// --- Python -> bytes -------------------------------------------------------------------------------------------------

[[noreturn]] void misfit(py::handle object, ValueType type) {
    std::string found;
    try {
        found = pgs::shown(bytes_of(py::repr(object)));
    } catch (const std::exception&) {
        found = Py_TYPE(object.ptr())->tp_name;
    }
    throw Error(Kind::bad_plan, "value does not fit its type").got(found).want(pgs::value_type_name(type));
}

template <typename T>
void put_integer(std::string& raw, py::handle object, ValueType type) {
    if (!PyLong_Check(object.ptr()) || PyBool_Check(object.ptr())) misfit(object, type);
    if constexpr (std::is_signed_v<T>) {
        int overflow = 0;
        const long long n = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
        if (overflow != 0 || !std::in_range<T>(n)) misfit(object, type);
        put_word(raw, static_cast<T>(n));
    } else {
        const unsigned long long n = PyLong_AsUnsignedLongLong(object.ptr());
        if (PyErr_Occurred()) {
            PyErr_Clear();
            misfit(object, type);
        }
        if (!std::in_range<T>(n)) misfit(object, type);
        put_word(raw, static_cast<T>(n));
    }
}

// A float is rounded to the nearest T; an int has to be one of T's values exactly.
template <typename T>
void put_float(std::string& raw, py::handle object, ValueType type) {
    const bool is_float = PyFloat_Check(object.ptr());
    if (!is_float && (!PyLong_Check(object.ptr()) || PyBool_Check(object.ptr()))) misfit(object, type);
    const double wide = PyFloat_AsDouble(object.ptr());
    if (PyErr_Occurred()) {
        PyErr_Clear();
        misfit(object, type);
    }
    const T narrow = static_cast<T>(wide);
    if (std::isfinite(wide) && !std::isfinite(narrow)) misfit(object, type);
    if (!is_float) {
        const auto back = py::reinterpret_steal<py::object>(PyLong_FromDouble(static_cast<double>(narrow)));
        if (!back || !back.equal(object)) misfit(object, type);
    }
    put_word(raw, narrow);
}

// The encoding of one value or array element; for a str without its length.
void put_scalar(std::string& raw, py::handle object, ValueType type) {
    switch (type) {
        case ValueType::u8: return put_integer<std::uint8_t>(raw, object, type);
        case ValueType::i8: return put_integer<std::int8_t>(raw, object, type);
        case ValueType::u16: return put_integer<std::uint16_t>(raw, object, type);
        case ValueType::i16: return put_integer<std::int16_t>(raw, object, type);
        case ValueType::u32: return put_integer<std::uint32_t>(raw, object, type);
        case ValueType::i32: return put_integer<std::int32_t>(raw, object, type);
        case ValueType::u64: return put_integer<std::uint64_t>(raw, object, type);
        case ValueType::i64: return put_integer<std::int64_t>(raw, object, type);
        case ValueType::f32: return put_float<float>(raw, object, type);
        case ValueType::f64: return put_float<double>(raw, object, type);
        case ValueType::boolean:
            if (!PyBool_Check(object.ptr())) misfit(object, type);
            return put_word(raw, static_cast<std::uint8_t>(object.ptr() == Py_True));
        case ValueType::str:
            if (!PyUnicode_Check(object.ptr())) misfit(object, type);
            raw += bytes_of(object);
            return;
        case ValueType::array: break;
    }
    misfit(object, type);
}

void check(const Value& value) {
    if (const auto problem = pgs::value_problem(value); !problem.empty())
        throw Error(Kind::bad_plan, std::string(problem)).got(pgs::bytes_text(value.raw.size())).want(form_name(value));
}

// numpy scalars as Python values, numpy arrays as lists of them; anything else as it is.
py::object plain(py::object object) {
    PyObject* p = object.ptr();
    if (PyUnicode_CheckExact(p) || PyLong_CheckExact(p) || PyFloat_CheckExact(p) || PyBool_Check(p)) return object;
    return py::hasattr(object, "tolist") ? py::object(object.attr("tolist")()) : object;
}

Value make_value(const py::object& given, const std::string& type_name) {
    const Form form = form_from_name(type_name);
    const py::object object = plain(given);
    Value value;
    const bool is_text = py::isinstance<py::str>(object) || py::isinstance<py::bytes>(object);
    if (is_text || !py::isinstance<py::sequence>(object)) {
        if (form.array) misfit(object, ValueType::array);
        value.type = form.type;
        put_scalar(value.raw, object, form.type);
        check(value);
        return value;
    }
    value.type = ValueType::array;
    value.element = form.type;
    for (py::handle item : object) {
        const py::object element = plain(py::reinterpret_borrow<py::object>(item));
        const std::size_t start = value.raw.size();
        if (form.type == ValueType::str) put_word(value.raw, std::uint64_t{0});
        put_scalar(value.raw, element, form.type);
        if (form.type == ValueType::str) {
            const std::uint64_t length = value.raw.size() - start - sizeof length;
            std::memcpy(value.raw.data() + start, &length, sizeof length);
        }
        ++value.count;
    }
    check(value);
    return value;
}

Value value_from_raw(const std::string& type_name, const py::bytes& raw) {
    const Form form = form_from_name(type_name);
    Value value;
    value.raw = raw;
    value.type = form.array ? ValueType::array : form.type;
    if (form.array) {
        value.element = form.type;
        if (const std::size_t bytes = pgs::value_type_bytes(form.type)) {
            value.count = value.raw.size() / bytes;
        } else {
            std::uint64_t length = 0;
            for (std::size_t at = 0; value.raw.size() - at >= sizeof length; ++value.count) {
                std::memcpy(&length, value.raw.data() + at, sizeof length);
                at += sizeof length;
                if (length > value.raw.size() - at) break;  // check() names the problem: too few bytes
                at += length;
            }
        }
    }
    check(value);
    return value;
}

// --- bytes -> Python -------------------------------------------------------------------------------------------------

py::object scalar_at(ValueType type, const char* p) {
    switch (type) {
        case ValueType::u8: return py::int_(word_at<std::uint8_t>(p));
        case ValueType::i8: return py::int_(word_at<std::int8_t>(p));
        case ValueType::u16: return py::int_(word_at<std::uint16_t>(p));
        case ValueType::i16: return py::int_(word_at<std::int16_t>(p));
        case ValueType::u32: return py::int_(word_at<std::uint32_t>(p));
        case ValueType::i32: return py::int_(word_at<std::int32_t>(p));
        case ValueType::u64: return py::int_(word_at<std::uint64_t>(p));
        case ValueType::i64: return py::int_(word_at<std::int64_t>(p));
        case ValueType::f32: return py::float_(static_cast<double>(word_at<float>(p)));
        case ValueType::f64: return py::float_(word_at<double>(p));
        case ValueType::boolean: return py::bool_(*p != 0);
        case ValueType::str:
        case ValueType::array: break;
    }
    throw std::logic_error("not a scalar type");
}

py::list elements(const Value& value, std::uint64_t limit) {
    const auto n = static_cast<std::size_t>(std::min(value.count, limit));
    py::list list(n);
    const char* p = value.raw.data();
    for (std::size_t i = 0; i < n; ++i) {
        py::object element;
        if (value.element == ValueType::str) {
            const auto length = word_at<std::uint64_t>(p);
            p += sizeof length;
            element = text_of({p, static_cast<std::size_t>(length)});
            p += length;
        } else {
            element = scalar_at(value.element, p);
            p += pgs::value_type_bytes(value.element);
        }
        PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), element.release().ptr());
    }
    return list;
}

py::object value_of(const Value& value) {
    if (value.type == ValueType::array) return elements(value, value.count);
    if (value.type == ValueType::str) return text_of(value.raw);
    return scalar_at(value.type, value.raw.data());
}

void require_array(const Value& value) {
    if (value.type != ValueType::array) throw py::type_error("a " + form_name(value) + " value is not an array");
}

std::string repr_text(const Value& value) {
    std::string text;
    if (value.type == ValueType::array && value.count > 8) {
        text = bytes_of(py::repr(elements(value, 8)));
        text.pop_back();
        text += ", ... " + std::to_string(value.count) + " in all]";
    } else {
        text = bytes_of(py::repr(value_of(value)));
    }
    return "Value(" + text + ", '" + form_name(value) + "')";
}

}  // namespace

void bind_value(py::module_& m) {
    py::class_<Value>(m, "Value", "One metadata value, exact: Value(7, 'u16'), Value([1, 2], 'u8'), Value('x', 'str').")
        .def(py::init(&make_value), py::arg("value"), py::arg("type"))
        .def_static("from_raw", &value_from_raw, py::arg("type"), py::arg("raw"))
        .def_property_readonly("type", &form_name)
        .def_property_readonly("value", &value_of)
        .def_property_readonly("raw", [](const Value& v) { return py::bytes(v.raw); })
        .def(
            "head",
            [](const Value& v, std::int64_t n) {
                require_array(v);
                return elements(v, static_cast<std::uint64_t>(std::max<std::int64_t>(n, 0)));
            },
            py::arg("n"))
        .def("__len__",
             [](const Value& v) {
                 require_array(v);
                 return v.count;
             })
        .def("__bool__", [](const Value&) { return true; })  // not by length: an empty array is a value too
        .def("__eq__",
             [](const Value& a, const py::object& b) -> py::object {
                 if (!py::isinstance<Value>(b)) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
                 return py::bool_(a == py::cast<const Value&>(b));
             })
        .def("__hash__",
             [](const Value& v) {
                 return std::hash<std::string>{}(v.raw) ^ (static_cast<std::size_t>(v.type) << 8) ^
                        static_cast<std::size_t>(v.element);
             })
        .def("__repr__", [](const Value& v) { return text_of(repr_text(v)); })
        .def(py::pickle([](const Value& v) { return py::make_tuple(form_name(v), py::bytes(v.raw)); },
                        [](const py::tuple& state) {
                            return value_from_raw(py::cast<std::string>(state[0]), py::cast<py::bytes>(state[1]));
                        }));
}
