// One exception type for the whole core: what happened as fields, never as a finished sentence.
// The text is composed in one place, pygguf_surgery/base/errors.py; the binding turns `kind` into the Python class.
#pragma once
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <utility>

namespace pgs {

enum class Kind {
    bad_file,        // the input is not what it should be
    bad_plan,        // what was asked for contradicts itself or the input
    unsupported,     // a correct request that this version cannot serve
    source_changed,  // an input changed while we used it
    out_of_space,    // the output does not fit
    os,              // a system call failed; os_errno says how
    cancelled,       // the caller asked to stop
};

struct Error : std::exception {
    Kind kind;
    std::string problem;                  // "duplicate key"; lower case, no full stop
    std::string path;                     // file
    std::string object;                   // tensor, key or header field
    std::optional<std::uint64_t> offset;  // byte in the file
    std::string found, expected, hint;
    int os_errno = 0;

    Error(Kind k, std::string p) : kind(k), problem(std::move(p)) {}
    const char* what() const noexcept override { return problem.c_str(); }

    // Chained at the throw: throw Error(Kind::bad_file, "duplicate key").in(path).on(key).at(offset)
    // clang-format off
    Error& in(std::string v) { path = std::move(v); return *this; }
    Error& on(std::string v) { object = std::move(v); return *this; }
    Error& at(std::uint64_t v) { offset = v; return *this; }
    Error& got(std::string v) { found = std::move(v); return *this; }
    Error& want(std::string v) { expected = std::move(v); return *this; }
    Error& advise(std::string v) { hint = std::move(v); return *this; }
    // clang-format on
};

// The error of a failed system call; `action` is what was tried ("open", "write").
Error os_error(int os_errno, const std::string& action, const std::string& path);

// "7 bytes", for `found` and `expected`.
std::string bytes_text(std::uint64_t n);

}  // namespace pgs
