// The three kinds of Source; open_source chooses.
#pragma once
#include <atomic>

#include "base/error.hpp"
#include "io/cache_guard.hpp"
#include "io/source.hpp"
#include "io/sys.hpp"

namespace pgs {

// A file that open_source has opened and examined.
struct OpenedFile {
    Fd fd;
    std::string path;
    Identity identity;
};

Error truncated(const std::string& path, int fd, std::uint64_t size);

// pread. With RWF_DONTCACHE the kernel drops most of what a read brought in; the guard does the rest.
class PositionalSource : public Source {
public:
    explicit PositionalSource(OpenedFile file);
    void read_at(std::uint64_t offset, std::span<std::byte> out) override;

protected:
    const bool dontcache_;
    CacheGuard guard_;
};

// O_DIRECT through a second descriptor; whatever the file system refuses is read positionally.
class DirectSource : public PositionalSource {
public:
    DirectSource(OpenedFile file, Fd direct) : PositionalSource(std::move(file)), direct_(std::move(direct)) {}
    void read_at(std::uint64_t offset, std::span<std::byte> out) override;

private:
    bool read_direct(std::uint64_t offset, std::span<std::byte> out);

    Fd direct_;
    std::atomic<bool> refused_{false};
};

// memcpy from a mapping of the file.
class MappedSource : public PositionalSource {
public:
    explicit MappedSource(OpenedFile file);
    void read_at(std::uint64_t offset, std::span<std::byte> out) override;

private:
    Mapping mapping_;
};

}  // namespace pgs
