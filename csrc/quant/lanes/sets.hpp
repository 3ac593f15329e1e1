// The compiled instances; only dispatch.cpp chooses among them.
#pragma once
#include "quant/lanes/kernels.hpp"

namespace pgs::lanes {
extern const Kernels scalar_set;
#if defined(__x86_64__)
extern const Kernels avx2_set, avx512_set;
#endif
}  // namespace pgs::lanes
