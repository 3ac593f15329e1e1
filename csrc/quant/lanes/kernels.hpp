// Vector kernels that give the linked ggml's bytes. Each is written once, over lanes, and compiled for several instruction
// sets; quant/dispatch.hpp says which of them runs. Free of the C++ standard library: kernels include it.
#pragma once
#include <stdint.h>

namespace pgs {

struct Grid;

// Rows of float32 to encode. All values are finite and below 2^48 in magnitude, all importance below 2^48 and not negative:
// ggml itself gets what is not.
struct Rows {
    const float* values;      // rows x row_elements; row_elements is a multiple of the type's block
    const float* importance;  // row_elements, for each of the rows; or null
    uint64_t rows, row_elements;
    unsigned char* target;
    const Grid* grid;  // of the IQ1, IQ2 and IQ3 types, else null
};

using Encode = bool (*)(const Rows& rows);
using Decode = void (*)(const unsigned char* source, float* target, uint64_t elements);  // whole blocks, any alignment

struct Kernels {
    const char* name;  // as in PGS_KERNELS
    // By ggml's number of the type. Null: the linked ggml does it. An encoder returns false at a block that only ggml may
    // decide about; nothing is promised about the target then.
    Encode encode[64];
    // Encoders with less error than ggml's, for the types that have one; null: encode. Each set gives the same bytes.
    Encode encode_best[64];
    Decode decode[64];
    // The largest magnitude as bits of a float32, which are in the order of the floats; NaN and infinity are above all.
    uint32_t (*largest)(const float* values, uint64_t elements);
};

}  // namespace pgs
