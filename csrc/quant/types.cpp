#include "quant/types.hpp"

#include <cctype>
#include <string>

#include "base/error.hpp"
#include "ggml.h"
#include "quant/lanes/sets.hpp"

namespace pgs {

namespace {

std::string upper(std::string text) {
    for (char& c : text) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    return text;
}

// ggml cannot be asked this; test_quant.py proves the list against its output.
bool importance_changes(std::int32_t type) {
    switch (type) {
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_MXFP4:
        case GGML_TYPE_NVFP4:
        case GGML_TYPE_TQ1_0:
        case GGML_TYPE_TQ2_0:
        case GGML_TYPE_Q1_0:
        case GGML_TYPE_Q2_0: return false;
        default: return true;
    }
}

TypeTable ask_ggml() {
    TypeTable table(GGML_TYPE_COUNT);
    for (std::int32_t id = 0; id < GGML_TYPE_COUNT; ++id) {
        const ggml_type_traits* traits = ggml_get_type_traits(static_cast<ggml_type>(id));
        // Removed types keep a slot ("DEPRECATED") with no size.
        if (!traits->type_name || traits->blck_size <= 0 || traits->type_size == 0) continue;
        TypeFacts& facts = table[static_cast<std::size_t>(id)];
        facts.id = id;
        facts.name = upper(traits->type_name);
        facts.block = static_cast<std::uint64_t>(traits->blck_size);
        facts.block_bytes = traits->type_size;
        facts.quantized = traits->is_quantized;
        facts.decodes = id == GGML_TYPE_F32 || traits->to_float != nullptr;
        // ggml_quantize_chunk takes exactly the types that ggml can also decode (Q8_1 and Q8_K, which exist only inside
        // dot products, have no to_float).
        facts.encodes = facts.decodes;
        facts.needs_importance = ggml_quantize_requires_imatrix(static_cast<ggml_type>(id));
        facts.uses_importance = facts.quantized && facts.encodes && importance_changes(id);
        facts.has_best = lanes::scalar::kernels.encode_best[id] != nullptr;  // each set has the same
    }
    return table;
}

}  // namespace

const TypeTable& type_table() {
    static const TypeTable table = ask_ggml();
    return table;
}

const TypeFacts& type_facts(std::int32_t type) {
    const TypeTable& table = type_table();
    if (type < 0 || static_cast<std::size_t>(type) >= table.size() ||
        table[static_cast<std::size_t>(type)].name.empty())
        throw Error(Kind::unsupported, "unknown tensor type").got(std::to_string(type));
    return table[static_cast<std::size_t>(type)];
}

std::uint64_t row_bytes(const TypeFacts& type, std::uint64_t elements) {
    // No block has 128 bytes per element, so that sums and small multiples of the result do not overflow either.
    if (elements > (std::uint64_t{1} << 56))
        throw Error(Kind::bad_plan, "a row is too long").got(std::to_string(elements));
    return elements / type.block * type.block_bytes;
}

const char* ggml_version_text() { return ggml_version(); }

}  // namespace pgs
