#include "gguf/header.hpp"

#include "base/checked.hpp"
#include "base/error.hpp"

namespace pgs {

namespace {

// Ids that ggml once had (ggml/include/ggml.h); files with them need an old llama.cpp.
const char* removed_type_name(std::int32_t type) {
    switch (type) {
        case 4: return "Q4_2";
        case 5: return "Q4_3";
        case 31: return "Q4_0_4_4";
        case 32: return "Q4_0_4_8";
        case 33: return "Q4_0_8_8";
        case 36: return "IQ4_NL_4_4";
        case 37: return "IQ4_NL_4_8";
        case 38: return "IQ4_NL_8_8";
        default: return nullptr;
    }
}

std::string dims_text(const std::vector<std::uint64_t>& ne) {
    std::string text = "[";
    for (const auto n : ne) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
    return text + "]";
}

}  // namespace

std::uint64_t tensor_bytes(const TypeTable& types, std::int32_t type, const std::vector<std::uint64_t>& ne) {
    if (const char* name = removed_type_name(type))
        throw Error(Kind::bad_plan, std::string("tensor type ") + name + " was removed from ggml")
            .got("type " + std::to_string(type))
            .advise("convert the model again");
    if (type < 0 || static_cast<std::size_t>(type) >= types.size() || types[static_cast<std::size_t>(type)].block == 0)
        throw Error(Kind::bad_plan, "unknown tensor type")
            .got("type " + std::to_string(type))
            .want("a ggml type, 0.." + std::to_string(static_cast<long long>(types.size()) - 1));
    const TypeFacts& facts = types[static_cast<std::size_t>(type)];

    if (ne.size() > max_tensor_dims)
        throw Error(Kind::bad_plan, "too many dimensions").got(std::to_string(ne.size())).want("at most 4");
    for (const auto n : ne)
        if (n > INT64_MAX)
            throw Error(Kind::bad_plan, "negative dimension").got(std::to_string(static_cast<std::int64_t>(n)));
    const std::uint64_t row = ne.empty() ? 1 : ne[0];
    if (row % facts.block != 0)
        throw Error(Kind::bad_plan, "row is not a multiple of the block of its type")
            .got(std::to_string(row) + " elements")
            .want("a multiple of " + std::to_string(facts.block) + " for " + facts.name);

    // A zero dimension counts as 1 here: readers multiply in any order, and [2^62, 2^62, 0] overflows in theirs.
    bool empty = row == 0;
    const auto row_elements = static_cast<std::int64_t>(empty ? facts.block : row);
    std::optional<std::int64_t> elements = row_elements;
    std::optional<std::uint64_t> bytes =
        checked_mul(static_cast<std::uint64_t>(row_elements) / facts.block, facts.block_bytes);
    for (std::size_t i = 1; i < ne.size(); ++i) {
        if (ne[i] == 0) {
            empty = true;
            continue;
        }
        if (elements) elements = checked_mul(*elements, static_cast<std::int64_t>(ne[i]));
        if (bytes) bytes = checked_mul(*bytes, ne[i]);
    }
    if (!elements) throw Error(Kind::bad_plan, "number of elements overflows").got("dimensions " + dims_text(ne));
    if (!bytes) throw Error(Kind::bad_plan, "number of bytes overflows").got("dimensions " + dims_text(ne));
    return empty ? 0 : *bytes;
}

}  // namespace pgs
