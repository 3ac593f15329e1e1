// The facts about ggml's types, asked from the linked ggml: there is no second table.
#pragma once
#include <cstdint>
#include <string>

#include "gguf/header.hpp"

namespace pgs {

const TypeTable& type_table();

// Error(unsupported) for a number that no type has.
const TypeFacts& type_facts(std::int32_t type);

// Id of a type by its name in any case ("q4_k", "Q4_K"); Error(unsupported) names the nearest ones.
std::int32_t type_from_name(const std::string& name);

// `elements` must be a multiple of the block; Error(bad_plan) above 2^56.
std::uint64_t row_bytes(const TypeFacts& type, std::uint64_t elements);

const char* ggml_version_text();

}  // namespace pgs
