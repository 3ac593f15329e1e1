// Callbacks that llama.cpp asks whether to go on. Compiled, as the abort callback is asked at each node of a graph, by a
// thread of ggml that would have to wait for Python's lock, and as Python code that a signal interrupts cannot say no.
#include <atomic>

#include "bind/bind.hpp"

namespace {

struct StopFlag {
    std::atomic<bool> set{false};
};

bool is_set(void* flag) { return static_cast<StopFlag*>(flag)->set.load(std::memory_order_relaxed); }

bool goes_on(float /*progress*/, void* flag) { return !is_set(flag); }

}  // namespace

void bind_stop(py::module_& m) {
    py::class_<StopFlag>(m, "StopFlag")
        .def(py::init<>())
        .def("set", [](StopFlag& flag) { flag.set.store(true); })
        .def("is_set", [](const StopFlag& flag) { return flag.set.load(); })
        .def_property_readonly("address", [](StopFlag& flag) { return reinterpret_cast<std::uintptr_t>(&flag); })
        .def_property_readonly("abort_callback",
                               [](const StopFlag&) { return reinterpret_cast<std::uintptr_t>(&is_set); })
        .def_property_readonly("progress_callback",
                               [](const StopFlag&) { return reinterpret_cast<std::uintptr_t>(&goes_on); });
}
