// Rows of float32 to a type and back. The bytes that the linked ggml gives are the definition; the kernels give the same.
#pragma once
#include <cstdint>
#include <optional>

#include "quant/types.hpp"

namespace pgs {

// Rows that are decoded and encoded at a time: a few ten thousand elements stay in the cache of a core, and even the
// slowest encoder is through them in tens of milliseconds.
std::uint64_t chunk_rows(std::uint64_t row_elements);

// Rows of a type to float32. `source` holds rows * row_bytes(type, row_elements) bytes. Any alignment.
void decode_rows(std::int32_t type, const std::byte* source, float* target, std::uint64_t rows,
                 std::uint64_t row_elements);

// Rows of float32 to a type. `importance` has row_elements entries for all of these rows, or is null.
// best: with less error than ggml's encoder, where there is such an encoder (type_has_best); it takes importance. The bytes
// of a row do not depend on the other rows. `first_row` only serves error messages. NaN or infinity in the input, or what ggml itself would reject or abort on, is
// Error(bad_plan) with row and column in `object`-free form; the caller adds the tensor's name.
void encode_rows(std::int32_t type, const float* source, std::byte* target, std::uint64_t rows,
                 std::uint64_t row_elements, const float* importance, std::uint64_t first_row, bool best = false);

// Has the type an encoder that is better than ggml's?
bool type_has_best(std::int32_t type);

// The first block (element, for types without blocks) that ggml's own validation rejects: NaN, infinity, an invalid
// scale. `nbytes` must be whole blocks.
std::optional<std::uint64_t> first_invalid_block(std::int32_t type, const std::byte* data, std::uint64_t nbytes);

// Importance rows as ggml may use them: finite, not negative, not all zero. `rows` x `row_elements`. `first_row` only
// serves error messages.
void check_importance(const float* importance, std::uint64_t rows, std::uint64_t row_elements,
                      std::uint64_t first_row = 0);

}  // namespace pgs
