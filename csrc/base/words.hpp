// Words as they are in a file: little-endian, at any address.
#pragma once
#include <bit>
#include <cstring>
#include <string>

namespace pgs {

static_assert(std::endian::native == std::endian::little, "words are copied: little-endian hosts only");

template <typename T>
void put_word(std::string& out, T word) {
    char bytes[sizeof word];
    std::memcpy(bytes, &word, sizeof word);
    out.append(bytes, sizeof word);
}

template <typename T>
T word_at(const void* p) {
    T word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

}  // namespace pgs
