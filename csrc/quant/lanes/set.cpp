// The table of one set; compiled once for each.
#include "quant/lanes/sets.hpp"

#include "ggml.h"

// clang-format off
#define PGS_ENCODERS(X)                                                                                                  \
    X(F16, f16) X(BF16, bf16) X(Q4_0, q4_0) X(Q4_1, q4_1) X(Q5_0, q5_0) X(Q5_1, q5_1) X(Q8_0, q8_0) X(Q1_0, q1_0)          \
    X(Q2_0, q2_0) X(TQ1_0, tq1_0) X(TQ2_0, tq2_0) X(Q2_K, q2_k) X(Q3_K, q3_k) X(Q4_K, q4_k) X(Q5_K, q5_k) X(Q6_K, q6_k)    \
    X(MXFP4, mxfp4) X(NVFP4, nvfp4) X(IQ4_NL, iq4_nl) X(IQ4_XS, iq4_xs) X(IQ3_XXS, iq3_xxs) X(IQ3_S, iq3_s)                \
    X(IQ2_XXS, iq2_xxs) X(IQ2_XS, iq2_xs) X(IQ2_S, iq2_s) X(IQ1_S, iq1_s) X(IQ1_M, iq1_m)
#define PGS_BEST_ENCODERS(X) X(MXFP4, mxfp4)
#define PGS_DECODERS(X) X(F16, f16) X(BF16, bf16) X(Q8_0, q8_0) X(Q4_K, q4_k) X(Q6_K, q6_k) X(MXFP4, mxfp4)
// clang-format on

#define PGS_TEXT(name) PGS_TEXT_OF(name)
#define PGS_TEXT_OF(name) #name

namespace pgs::lanes {

namespace PGS_SET {

#define PGS_DECLARE(type, name) bool encode_##name(const Rows& rows);
PGS_ENCODERS(PGS_DECLARE)
#undef PGS_DECLARE
#define PGS_DECLARE(type, name) bool encode_##name##_best(const Rows& rows);
PGS_BEST_ENCODERS(PGS_DECLARE)
#undef PGS_DECLARE
#define PGS_DECLARE(type, name) void decode_##name(const unsigned char* source, float* target, uint64_t elements);
PGS_DECODERS(PGS_DECLARE)
#undef PGS_DECLARE
uint32_t largest(const float* values, uint64_t elements);

static_assert(GGML_TYPE_COUNT <= sizeof(Kernels::encode) / sizeof(Encode));

static constexpr Kernels table() noexcept {
    Kernels set{PGS_TEXT(PGS_SET), {}, {}, {}, largest};
#define PGS_ENTRY(type, name) set.encode[GGML_TYPE_##type] = encode_##name;
    PGS_ENCODERS(PGS_ENTRY)
#undef PGS_ENTRY
#define PGS_ENTRY(type, name) set.encode_best[GGML_TYPE_##type] = encode_##name##_best;
    PGS_BEST_ENCODERS(PGS_ENTRY)
#undef PGS_ENTRY
#define PGS_ENTRY(type, name) set.decode[GGML_TYPE_##type] = decode_##name;
    PGS_DECODERS(PGS_ENTRY)
#undef PGS_ENTRY
    return set;
}
extern constinit const Kernels kernels = table();

}  // namespace PGS_SET

}  // namespace pgs::lanes
