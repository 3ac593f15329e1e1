// AVX2, behind a target region: the rest of the program must run without it.
#include <cstdint>

#include "quant/lanes/sets.hpp"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define W 8
namespace pgs::lanes::avx2 {
#include "quant/lanes/generic.inl"
}  // namespace pgs::lanes::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace pgs::lanes {
const Kernels avx2_set{"avx2", avx2::decode_f16, avx2::encode_mxfp4, avx2::all_finite};
}
#endif
