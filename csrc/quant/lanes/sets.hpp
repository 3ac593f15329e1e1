// The compiled sets; only dispatch.cpp chooses among them.
#pragma once
#include "quant/lanes/kernels.hpp"

namespace pgs::lanes {
// clang-format off
namespace scalar { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace sse { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#elif defined(__aarch64__)
namespace neon { extern const Kernels kernels; }
#endif
// clang-format on
}  // namespace pgs::lanes
