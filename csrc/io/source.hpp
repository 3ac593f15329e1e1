// A file that is only read. Three ways to read it behind one interface; see open_source.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

namespace pgs {

enum class Io {
    automatic,   // positional where the kernel and the file system have RWF_DONTCACHE, else direct, else positional
    mapped,      // mmap; a file truncated meanwhile kills the process with SIGBUS
    positional,  // pread; leaves the page cache as found (RWF_DONTCACHE, else DONTNEED on what was not resident)
    direct,      // O_DIRECT; falls back to positional where the file system refuses it
};

// "auto" | "mmap" | "pread" | "direct"; anything else is Error(bad_plan).
Io io_from_name(const std::string& name);

// What says that a file is still the one that was opened.
struct Identity {
    std::uint64_t device = 0, inode = 0, size = 0;
    std::int64_t mtime_ns = 0;
    bool operator==(const Identity&) const = default;
};

// Owns the descriptor. read_at may be called from many threads at once. Until it is destroyed, up to about 64 MiB of
// what it read may be in the page cache; then nothing that was not there before.
class Source {
public:
    virtual ~Source();
    Source(const Source&) = delete;
    Source& operator=(const Source&) = delete;
    const std::string& path() const { return path_; }
    const Identity& identity() const { return identity_; }
    std::uint64_t size() const { return identity_.size; }
    // Fills `out` with the bytes at `offset`. Fewer bytes in the file than when it was opened: Error(source_changed);
    // a range outside size(): Error(bad_file); a failed read: Error(os).
    virtual void read_at(std::uint64_t offset, std::span<std::byte> out) = 0;
    // Throws Error(bad_file) for a range outside size().
    void check_range(std::uint64_t offset, std::uint64_t nbytes) const;
    // Throws Error(source_changed) if the file, or what its path now names, is not the one that was opened.
    void check_unchanged() const;

protected:
    Source(std::string path, const Identity& identity, int fd) : path_(std::move(path)), identity_(identity), fd_(fd) {}

    std::string path_;
    Identity identity_;
    int fd_;
};

// Opens a regular file (never blocks on a FIFO or device: Error(bad_file)); a missing file or no permission is
// Error(os). With `expected`, a file with another identity is Error(source_changed).
// PGS_DONTCACHE=0 in the environment does without RWF_DONTCACHE, here and in create_sink.
std::unique_ptr<Source> open_source(const std::string& path, Io io, const Identity* expected = nullptr);

// A read-only mapping of a whole file for zero-copy views; unmapped when the last owner goes.
class Mapping {
public:
    explicit Mapping(const std::string& path, const Identity& expected);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    std::span<const std::byte> bytes() const { return {data_, size_}; }

private:
    const std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace pgs
