// The facts about ggml's types, asked from the linked ggml: there is no second table.
#pragma once
#include <cstdint>

#include "gguf/header.hpp"

namespace pgs {

const TypeTable& type_table();

// Error(unsupported) for a number that no type has.
const TypeFacts& type_facts(std::int32_t type);

// `elements` must be a multiple of the block; Error(bad_plan) above 2^56.
std::uint64_t row_bytes(const TypeFacts& type, std::uint64_t elements);

const char* ggml_version_text();

}  // namespace pgs
