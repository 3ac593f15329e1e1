// For any machine: four lanes are one vector of the baseline (SSE2, NEON).
#include <cstdint>

#include "quant/lanes/sets.hpp"

#define W 4
namespace pgs::lanes::scalar {
#include "quant/lanes/generic.inl"
}  // namespace pgs::lanes::scalar

namespace pgs::lanes {
const Kernels scalar_set{"scalar", scalar::decode_f16, scalar::encode_mxfp4, scalar::all_finite};
}
