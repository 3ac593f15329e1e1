// Vector kernels that give the linked ggml's bytes, and which of them runs. Each is written once, as plain loops over lanes
// in lanes/generic.inl, and compiled for several instruction sets; PGS_KERNELS forces one.
#pragma once
#include <cstdint>

namespace pgs {

struct Kernels {
    const char* name;  // as in PGS_KERNELS
    // Elements are whole blocks. Null: the linked ggml does it.
    void (*decode_f16)(const std::uint16_t* source, float* target, std::uint64_t elements);
    // Finite input. False: a block that only ggml may decide about (its largest value is denormal, or all but infinite);
    // nothing is promised about the target then.
    bool (*encode_mxfp4)(const float* source, unsigned char* target, std::uint64_t elements);
    bool (*all_finite)(const float* source, std::uint64_t elements);
};

// The set that runs: the best one of this machine, or PGS_KERNELS=ggml|scalar|avx2|avx512; Error(unsupported) for a name that is
// unknown or a set that this machine lacks. Called where work starts, never from its threads: getenv may crash beside a
// setenv of another thread.
const Kernels& choose_kernels();

// The set of the last choice.
const Kernels& kernels();

}  // namespace pgs
