// Which set of kernels runs.
#pragma once
#include "quant/lanes/kernels.hpp"

namespace pgs {

// The set that runs: the best one of this machine, or PGS_KERNELS=ggml|scalar|sse|avx2|avx512|neon; Error(unsupported) for a
// name that is unknown or a set that this machine lacks. Called where work starts, never from its threads: getenv may crash
// beside a setenv of another thread.
const Kernels& choose_kernels();

// The set of the last choice.
const Kernels& kernels();

}  // namespace pgs
