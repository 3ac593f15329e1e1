// AVX-512, behind a target region: the rest of the program must run without it.
#include <cstdint>

#include "quant/lanes/sets.hpp"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define W 16
namespace pgs::lanes::avx512 {
#include "quant/lanes/generic.inl"
}  // namespace pgs::lanes::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace pgs::lanes {
const Kernels avx512_set{"avx512", avx512::decode_f16, avx512::encode_mxfp4, avx512::all_finite};
}
#endif
