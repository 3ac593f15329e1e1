// Rows of float32 to a type and back. The bytes that the linked ggml gives are the definition; the kernels give the same.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/error.hpp"
#include "quant/lanes/kernels.hpp"
#include "quant/types.hpp"

namespace pgs {

// Rows that are decoded and encoded at a time: a few ten thousand elements stay in the cache of a core, and even the
// slowest encoder is through them in tens of milliseconds.
std::uint64_t chunk_rows(std::uint64_t row_elements);

// Rows of a type to float32, by the chosen kernels (quant/dispatch.hpp) or by ggml: looked up once. Any thread may use it.
class Decoder {
public:
    // Error(unsupported) for a type that cannot be decoded.
    Decoder(const TypeFacts& type, std::uint64_t row_elements);

    // `source` holds whole rows, at any address.
    void decode(const std::byte* source, float* target, std::uint64_t rows) const;

    // `source` itself if it is float32 already, at an address that floats may have; else null.
    const float* in_place(const std::byte* source) const;

private:
    std::uint64_t row_elements_, row_bytes_;
    bool is_float32_;
    Decode lane_;  // null: ggml's
    void (*ggml_)(const void* source, float* target, std::int64_t elements);
};

// Rows of float32 to a type, likewise.
class Encoder {
public:
    // best: with less error than ggml's encoder, where there is such an encoder (TypeFacts::has_best); it takes importance.
    // Error(unsupported) for a type that cannot be encoded.
    Encoder(const TypeFacts& type, std::uint64_t row_elements, bool best);

    // `importance` has row_elements entries for all of these rows, or is null. The bytes of a row do not depend on the
    // other rows. NaN or infinity in the input, or what ggml itself would reject or abort on, is Error(bad_plan) with row
    // and column, counted from `first_row`, and without `object`: the caller adds the tensor's name.
    void encode(const float* source, std::byte* target, std::uint64_t rows, const float* importance,
                std::uint64_t first_row) const;

private:
    Error invalid(const float* source, const std::byte* target, std::uint64_t rows, std::uint64_t first_row) const;

    const TypeFacts& type_;
    std::uint64_t row_elements_, row_bytes_;
    const Kernels& lanes_;
    bool best_;
};

// The first block (element, for types without blocks) that ggml's own validation rejects: NaN, infinity, an invalid
// scale. `nbytes` must be whole blocks.
std::optional<std::uint64_t> first_invalid_block(const TypeFacts& type, const std::byte* data, std::uint64_t nbytes);

// Importance rows as ggml may use them: finite, not negative, not all zero. `rows` x `row_elements`. `first_row` only
// serves error messages.
void check_importance(const float* importance, std::uint64_t rows, std::uint64_t row_elements,
                      std::uint64_t first_row = 0);

}  // namespace pgs
