// What a file that is no GGUF looks like, for the hint of the error.
#include "gguf/header.hpp"

#include <cctype>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace pgs {

std::string_view foreign_format_hint(std::string_view head) {
    if (head.starts_with("version https://git-lfs"))
        return "it looks like a git-lfs pointer: run `git lfs pull`, or download the file itself";
    if (head.starts_with("PK\x03\x04"))
        return "it looks like a zip archive (an old PyTorch checkpoint is one): convert the model to GGUF";
    if (head.size() >= 2 && head[0] == '\x80' && head[1] >= 2 && head[1] <= 5)
        return "it looks like a Python pickle (an old PyTorch checkpoint is one): convert the model to GGUF";
    if (head.starts_with("lmgg") || head.starts_with("tjgg") || head.starts_with("fmgg"))
        return "it looks like a ggml file from before GGUF: convert the model again";
    if (head.size() >= 9 && head[8] == '{') {
        std::uint64_t length;
        std::memcpy(&length, head.data(), sizeof length);
        if (length <= 100'000'000) return "it looks like a safetensors file: convert the model to GGUF";
    }
    std::size_t i = 0;
    if (head.starts_with("\xEF\xBB\xBF")) i = 3;  // byte order mark
    while (i < head.size() && std::isspace(static_cast<unsigned char>(head[i]))) ++i;
    std::string word;
    for (; i < head.size() && word.size() < 9; ++i)
        word += static_cast<char>(std::tolower(static_cast<unsigned char>(head[i])));
    for (const char* start : {"<!doctype", "<html", "<head", "<?xml"})
        if (word.starts_with(start))
            return "it looks like an HTML page: the download needs a login, or the address is wrong";
    return {};
}

}  // namespace pgs
