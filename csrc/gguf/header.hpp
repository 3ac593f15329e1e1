// A GGUF header as data: read strictly (reader.cpp), written canonically (writer.cpp). No tensor bytes.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/source.hpp"

namespace pgs {

// The facts of a ggml type; quant/types.cpp asks the linked ggml. The reader and the writer need the first four.
struct TypeFacts {
    std::int32_t id = -1;
    std::string name;         // upper case, "Q4_K"; empty: no such type
    std::uint64_t block = 0;  // elements per block
    std::uint64_t block_bytes = 0;
    bool quantized = false;
    bool encodes = false;           // from float32
    bool decodes = false;           // to float32
    bool needs_importance = false;  // ggml refuses to encode without
    bool uses_importance = false;   // an importance changes the bytes
    bool has_best = false;          // there is an encoder with less error than ggml's; it uses importance
};
using TypeTable = std::vector<TypeFacts>;  // index = id

enum class ValueType : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, str, array, u64, i64, f64 };
inline constexpr std::uint32_t value_type_count = 13;

// Limits of llama.cpp's reader (ggml/src/gguf.cpp, ggml.h) and of the GGUF specification.
inline constexpr std::uint64_t max_string_bytes = std::uint64_t{1} << 30;
inline constexpr std::uint64_t max_array_count = std::uint64_t{1} << 30;
inline constexpr std::uint64_t max_key_bytes = 65535;
inline constexpr std::uint64_t max_tensor_name_bytes = 63;
inline constexpr std::uint32_t max_tensor_dims = 4;
inline constexpr std::uint64_t max_alignment = std::uint64_t{1} << 20;
inline constexpr std::uint64_t default_alignment = 32;
inline constexpr const char* alignment_key = "general.alignment";

// Names used everywhere, Python and shell included: u8 i8 u16 i16 u32 i32 f32 bool str array u64 i64 f64.
const char* value_type_name(ValueType type);
// Encoded bytes of one value; 0 for str and array.
std::size_t value_type_bytes(ValueType type);

// One metadata value, byte-exact. `raw` is its encoding in the file after the type words: for str the bytes without the
// length; for arrays the elements, strings among them each with their u64 length.
struct Value {
    ValueType type = ValueType::u8;
    ValueType element = ValueType::u8;  // arrays only
    std::uint64_t count = 0;            // arrays only
    std::string raw;
    bool operator==(const Value&) const = default;
};

// What is wrong with a value as an encoding ("" if nothing): its raw bytes do not fit its type and count, or an array
// of arrays. Bytes that are only unusual (bool 2, a string that is no UTF-8) are fine.
std::string_view value_problem(const Value& value);

// As Python decodes it: no overlong forms, no surrogates, at most U+10FFFF.
bool is_utf8(std::string_view text);

// `text` for a message: control bytes and bytes that are no UTF-8 as \xNN, at most about 100 characters.
std::string shown(std::string_view text);

// What a file that starts with `head` (up to 64 bytes) and is no GGUF looks like, as a hint; "" if nobody knows.
std::string_view foreign_format_hint(std::string_view head);

struct TensorInfo {
    std::string name;
    std::vector<std::uint64_t> ne;  // ggml order, fastest first; empty is a scalar
    std::int32_t type = 0;
    std::uint64_t offset = 0;  // relative to the data section
    std::uint64_t nbytes = 0;
};

struct Header {
    std::uint32_t version = 3;
    std::uint64_t alignment = 32;
    std::uint64_t data_offset = 0;  // start of the data section = size of the header with its padding
    std::vector<std::pair<std::string, Value>> metadata;
    std::vector<TensorInfo> tensors;
    std::vector<std::string> warnings;  // one sentence each
};

struct ReadOptions {
    bool strict = false;         // warnings become errors
    bool metadata_only = false;  // the file may lack its tensor data
};
Header read_header(Source& source, const TypeTable& types, const ReadOptions& options);

// Bytes of a tensor; Error(bad_plan) on overflow, an unknown type or a row that is no multiple of the block.
std::uint64_t tensor_bytes(const TypeTable& types, std::int32_t type, const std::vector<std::uint64_t>& ne);

struct EncodedHeader {
    std::string bytes;                   // up to the data section, padding included
    std::vector<std::uint64_t> offsets;  // of each tensor, from the start of the file
    std::uint64_t file_bytes = 0;        // the last tensor's padding included
};
// Canonical header: version 3, tensors in the given order (their `offset` and `nbytes` are computed here).
// Error(bad_plan) for what a canonical file cannot hold: duplicate or empty key or name, name > 63 bytes, > 4 dims,
// nested arrays, an alignment below 32, or one that general.alignment in `metadata` does not declare (32 needs no key).
EncodedHeader encode_header(const std::vector<std::pair<std::string, Value>>& metadata,
                            std::vector<TensorInfo>& tensors, std::uint64_t alignment, const TypeTable& types);

}  // namespace pgs
