// The facts about ggml's types, asked from the linked ggml: there is no second table.
#pragma once
#include <cstdint>
#include <string>

#include "gguf/header.hpp"

namespace pgs {

const TypeTable& type_table();

// Id of a type by its name in any case ("q4_k", "Q4_K"); Error(unsupported) names the nearest ones.
std::int32_t type_from_name(const std::string& name);

bool type_is_quantized(std::int32_t type);
bool type_can_encode(std::int32_t type);  // from float32
bool type_can_decode(std::int32_t type);  // to float32
bool type_needs_importance(std::int32_t type);
bool type_uses_importance(std::int32_t type);

// `elements` must be a multiple of the block; Error(bad_plan) above 2^56.
std::uint64_t row_bytes(std::int32_t type, std::uint64_t elements);
const char* ggml_version_text();

}  // namespace pgs
