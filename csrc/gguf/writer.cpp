#include "gguf/header.hpp"

#include <bit>
#include <cstring>
#include <string_view>
#include <unordered_set>

#include "base/checked.hpp"
#include "base/error.hpp"
#include "base/words.hpp"

namespace pgs {

namespace {

void put_string(std::string& out, std::string_view text) {
    put_word(out, static_cast<std::uint64_t>(text.size()));
    out += text;
}

// What a key and a tensor name have in common.
void check_name(const char* what, const std::string& name, std::uint64_t longest,
                std::unordered_set<std::string_view>& seen) {
    auto bad = [&](const char* problem) { return Error(Kind::bad_plan, std::string(what) + problem).on(shown(name)); };
    if (name.empty()) throw bad(" is empty");
    if (name.find('\0') != std::string::npos) throw bad(" contains a NUL byte");
    if (!is_utf8(name)) throw bad(" is not UTF-8");
    if (name.size() > longest)
        throw bad(" is too long").got(bytes_text(name.size())).want("at most " + std::to_string(longest));
    if (!seen.insert(name).second) throw bad(" occurs twice");
}

void check_alignment(std::uint64_t alignment, const std::vector<std::pair<std::string, Value>>& metadata) {
    auto bad = [](const char* problem) { return Error(Kind::bad_plan, problem).on(alignment_key); };
    if (!std::has_single_bit(alignment) || alignment < default_alignment || alignment > max_alignment)
        throw bad("unusable alignment")
            .got(std::to_string(alignment))
            .want("a power of two, 32..1048576")
            .advise("llama.cpp aborts on smaller ones");
    const Value* value = nullptr;
    for (const auto& [key, v] : metadata)
        if (key == alignment_key) value = &v;
    if (!value) {
        if (alignment != default_alignment)
            throw bad("key is missing").want("u32 " + std::to_string(alignment) + ", the alignment asked for");
        return;
    }
    if (value->type != ValueType::u32) throw bad("wrong value type").got(value_type_name(value->type)).want("u32");
    std::uint32_t declared = 0;
    if (value->raw.size() == sizeof declared) std::memcpy(&declared, value->raw.data(), sizeof declared);
    if (declared != alignment)
        throw bad("value is not the file's alignment").got(std::to_string(declared)).want(std::to_string(alignment));
}

}  // namespace

EncodedHeader encode_header(const std::vector<std::pair<std::string, Value>>& metadata,
                            std::vector<TensorInfo>& tensors, std::uint64_t alignment, const TypeTable& types) {
    check_alignment(alignment, metadata);

    EncodedHeader encoded;
    std::string& out = encoded.bytes;
    std::size_t total = 24;
    for (const auto& [key, value] : metadata) total += 8 + key.size() + 4 + 12 + value.raw.size();
    for (const auto& tensor : tensors) total += 8 + tensor.name.size() + 4 + 8 * tensor.ne.size() + 4 + 8;
    out.reserve(total + alignment);

    out = "GGUF";
    put_word(out, std::uint32_t{3});
    put_word(out, static_cast<std::uint64_t>(tensors.size()));
    put_word(out, static_cast<std::uint64_t>(metadata.size()));

    std::unordered_set<std::string_view> seen;
    for (const auto& [key, value] : metadata) {
        check_name("key", key, max_key_bytes, seen);
        if (const auto problem = value_problem(value); !problem.empty())
            throw Error(Kind::bad_plan, std::string(problem)).on(shown(key));
        put_string(out, key);
        put_word(out, static_cast<std::uint32_t>(value.type));
        if (value.type == ValueType::array) {
            put_word(out, static_cast<std::uint32_t>(value.element));
            put_word(out, value.count);
        }
        if (value.type == ValueType::str)
            put_string(out, value.raw);
        else
            out += value.raw;
    }

    seen.clear();
    std::uint64_t data_bytes = 0;
    for (auto& tensor : tensors) {
        check_name("tensor name", tensor.name, max_tensor_name_bytes, seen);
        try {
            tensor.nbytes = tensor_bytes(types, tensor.type, tensor.ne);
        } catch (Error& e) {
            e.on(shown(tensor.name));
            throw;
        }
        tensor.offset = data_bytes;
        const auto padded = checked_pad(tensor.nbytes, alignment);
        const auto end = padded ? checked_add(data_bytes, *padded) : std::nullopt;
        if (!end) throw Error(Kind::bad_plan, "sum of the tensor sizes overflows").on(shown(tensor.name));
        data_bytes = *end;

        put_string(out, tensor.name);
        put_word(out, static_cast<std::uint32_t>(tensor.ne.size()));
        for (const auto n : tensor.ne) put_word(out, n);
        put_word(out, tensor.type);
        put_word(out, tensor.offset);
    }

    const auto data_offset = checked_pad(static_cast<std::uint64_t>(out.size()), alignment);
    const auto file_bytes = data_offset ? checked_add(*data_offset, data_bytes) : std::nullopt;
    // Offsets in a file are signed for the kernel (off_t).
    if (!file_bytes || *file_bytes > INT64_MAX) throw Error(Kind::bad_plan, "size of the file overflows");
    out.resize(*data_offset, '\0');
    encoded.offsets.reserve(tensors.size());
    for (const auto& tensor : tensors) encoded.offsets.push_back(*data_offset + tensor.offset);
    encoded.file_bytes = *file_bytes;
    return encoded;
}

}  // namespace pgs
