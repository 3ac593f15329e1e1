// The linked ggml: rows of float32 to a type and back. The bytes it gives are the definition.
#pragma once
#include <cstdint>
#include <optional>

#include "quant/types.hpp"

namespace pgs {

// Rows of a type to float32. `source` holds rows * row_bytes(type, row_elements) bytes. Any alignment.
void decode_rows(std::int32_t type, const std::byte* source, float* target, std::uint64_t rows, std::uint64_t row_elements);

// Rows of float32 to a type. `importance` has row_elements entries for all of these rows, or is null.
// `first_row` only serves error messages. NaN or infinity in the input, or what ggml itself would reject or abort on, is
// Error(bad_plan) with row and column in `object`-free form; the caller adds the tensor's name.
void encode_rows(std::int32_t type, const float* source, std::byte* target, std::uint64_t rows, std::uint64_t row_elements,
                 const float* importance, std::uint64_t first_row);

// The first block (element, for types without blocks) that ggml's own validation rejects: NaN, infinity, an invalid
// scale. `nbytes` must be whole blocks.
std::optional<std::uint64_t> first_invalid_block(std::int32_t type, const std::byte* data, std::uint64_t nbytes);

// Importance rows as ggml may use them: finite, not negative, not all zero. `rows` x `row_elements`. `first_row` only
// serves error messages.
void check_importance(const float* importance, std::uint64_t rows, std::uint64_t row_elements, std::uint64_t first_row = 0);

}  // namespace pgs
