#include "gguf/header.hpp"

#include <bit>
#include <cstring>
#include <utility>

#include "base/checked.hpp"
#include "base/words.hpp"

namespace pgs {

namespace {

struct ValueTypeFacts {
    const char* name;
    std::size_t bytes;
};

// Index = id in the file.
constexpr ValueTypeFacts value_types[value_type_count] = {
    {"u8", 1},   {"i8", 1},  {"u16", 2},   {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
    {"bool", 1}, {"str", 0}, {"array", 0}, {"u64", 8}, {"i64", 8}, {"f64", 8},
};

// Bytes of the UTF-8 sequence at `p`, 0 if it is none.
std::size_t sequence_bytes(const unsigned char* p, const unsigned char* end) {
    auto continues = [&](std::size_t i, unsigned low = 0x80, unsigned high = 0xBF) {
        return std::cmp_greater(end - p, i) && p[i] >= low && p[i] <= high;
    };
    const unsigned lead = p[0];
    if (lead < 0x80) return 1;
    if (lead >= 0xC2 && lead <= 0xDF) return continues(1) ? 2 : 0;
    if (lead >= 0xE0 && lead <= 0xEF) {
        const unsigned low = lead == 0xE0 ? 0xA0 : 0x80;   // below: an overlong form
        const unsigned high = lead == 0xED ? 0x9F : 0xBF;  // above: a surrogate
        return continues(1, low, high) && continues(2) ? 3 : 0;
    }
    if (lead >= 0xF0 && lead <= 0xF4) {
        const unsigned low = lead == 0xF0 ? 0x90 : 0x80;
        const unsigned high = lead == 0xF4 ? 0x8F : 0xBF;  // above U+10FFFF
        return continues(1, low, high) && continues(2) && continues(3) ? 4 : 0;
    }
    return 0;
}

}  // namespace

const char* value_type_name(ValueType type) {
    const auto id = static_cast<std::uint32_t>(type);
    return id < value_type_count ? value_types[id].name : "unknown";
}

std::size_t value_type_bytes(ValueType type) {
    const auto id = static_cast<std::uint32_t>(type);
    return id < value_type_count ? value_types[id].bytes : 0;
}

bool is_utf8(std::string_view text) {
    auto p = reinterpret_cast<const unsigned char*>(text.data());
    const auto end = p + text.size();
    while (p < end) {
        if (end - p >= 8) {  // most text is ASCII: eight bytes at once
            std::uint64_t word;
            std::memcpy(&word, p, 8);
            word &= 0x8080808080808080u;
            if (word == 0) {
                p += 8;
                continue;
            }
            p += std::countr_zero(word) / 8;  // the first that is not
        }
        const std::size_t n = sequence_bytes(p, end);
        if (n == 0) return false;
        p += n;
    }
    return true;
}

std::string shown(std::string_view text) {
    constexpr std::size_t longest = 100;
    constexpr char hex[] = "0123456789abcdef";
    std::string out;
    auto p = reinterpret_cast<const unsigned char*>(text.data());
    const auto end = p + text.size();
    while (p < end) {
        if (out.size() >= longest) return out + "...";
        const std::size_t n = *p < 0x20 || *p == 0x7F ? 0 : sequence_bytes(p, end);
        if (n == 0) {
            out += {'\\', 'x', hex[*p >> 4], hex[*p & 15]};
            ++p;
        } else {
            out.append(reinterpret_cast<const char*>(p), n);
            p += n;
        }
    }
    return out;
}

std::string_view value_problem(const Value& value) {
    const std::uint64_t have = value.raw.size();
    if (static_cast<std::uint32_t>(value.type) >= value_type_count) return "unknown value type";
    if (value.type == ValueType::str) return have > max_string_bytes ? "string longer than 1 GiB" : "";
    if (value.type != ValueType::array)
        return have == value_type_bytes(value.type) ? "" : "wrong number of bytes for its type";

    if (static_cast<std::uint32_t>(value.element) >= value_type_count) return "unknown element type";
    if (value.element == ValueType::array) return "array of arrays";
    if (value.count > max_array_count) return "array of more than 2^30 elements";
    if (value.element != ValueType::str) {
        const auto bytes = checked_mul<std::uint64_t>(value.count, value_type_bytes(value.element));
        return bytes && *bytes == have ? "" : "wrong number of bytes for its type and count";
    }
    std::uint64_t at = 0;
    for (std::uint64_t i = 0; i < value.count; ++i) {
        std::uint64_t length;
        if (have - at < sizeof length) return "wrong number of bytes for its strings";
        std::memcpy(&length, value.raw.data() + at, sizeof length);
        at += sizeof length;
        if (length > have - at) return "wrong number of bytes for its strings";
        at += length;
    }
    return at == have ? "" : "wrong number of bytes for its strings";
}

}  // namespace pgs
