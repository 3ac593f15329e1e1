// The output file: at every instant its path holds the complete old file or the complete new one.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "io/source.hpp"

namespace pgs {

struct SinkOptions {
    bool overwrite = false;
    Io io = Io::automatic;
    std::vector<Identity> inputs;  // files that the output must not be (output == input: Error(bad_plan))
};

// Life: create (hidden temp in the target's folder, space reserved) -> write_at from any thread, every byte of
// [0, size) exactly once, in any order -> commit, last, from one thread. Destroying it without commit removes the temp.
class Sink {
public:
    Sink() = default;
    virtual ~Sink() = default;
    Sink(const Sink&) = delete;
    Sink& operator=(const Sink&) = delete;
    // The memory of `data` may be reused after return. For speed place it so that address and offset agree modulo 4096.
    virtual void write_at(std::uint64_t offset, std::span<const std::byte> data) = 0;
    // data fsync, link or rename into place, folder fsync. A failed fsync is never retried. A target that appeared
    // meanwhile without `overwrite` is an error and is left alone.
    virtual void commit() = 0;
};

// Errors before the first byte: missing folder, no permission, target exists without overwrite (Error(os, EEXIST)),
// target is not a regular file or is an input (Error(bad_plan)), not enough space (Error(out_of_space), found/expected
// = bytes). A symbolic link is followed: the file that it names is written and the link stays.
// PGS_TMPFILE=0 in the environment uses a named temp file even where O_TMPFILE exists.
std::unique_ptr<Sink> create_sink(const std::string& path, std::uint64_t size, const SinkOptions& options);

}  // namespace pgs
