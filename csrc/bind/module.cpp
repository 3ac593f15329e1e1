#include "bind/bind.hpp"

PYBIND11_MODULE(_core, m) {
    m.doc() = "The C++ core of pygguf_surgery. Not public: use the pygguf_surgery package.";
    m.attr("__version__") = PGS_VERSION;
    bind_errors(m);
    bind_io(m);
    bind_value(m);
    bind_gguf(m);
    bind_quant(m);
    bind_engine(m);
    bind_stop(m);
}
