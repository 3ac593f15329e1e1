#include "io/source.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base/error.hpp"
#include "io/readers.hpp"

namespace pgs {
namespace {

Identity identity_of(const struct stat& st) {
    return {static_cast<std::uint64_t>(st.st_dev), static_cast<std::uint64_t>(st.st_ino),
            static_cast<std::uint64_t>(st.st_size),
            static_cast<std::int64_t>(st.st_mtim.tv_sec) * 1'000'000'000 + st.st_mtim.tv_nsec};
}

// Throws if `now` is not the file that `then` was.
void check_same(const std::string& path, const Identity& then, const Identity& now) {
    if (now == then) return;
    if (now.device != then.device || now.inode != then.inode)
        throw Error(Kind::source_changed, "replaced by another file").in(path);
    if (now.size != then.size)
        throw Error(Kind::source_changed, now.size < then.size ? "truncated" : "grown")
            .in(path)
            .got(bytes_text(now.size))
            .want(bytes_text(then.size));
    throw Error(Kind::source_changed, "modified")
        .in(path)
        .got("mtime " + std::to_string(now.mtime_ns) + " ns")
        .want("mtime " + std::to_string(then.mtime_ns) + " ns");
}

const char* kind_name(mode_t mode) {
    if (S_ISDIR(mode)) return "is a directory";
    if (S_ISFIFO(mode)) return "is a FIFO, not a regular file";
    if (S_ISSOCK(mode)) return "is a socket, not a regular file";
    return "is a device, not a regular file";
}

OpenedFile open_regular(const std::string& path, const Identity* expected) {
    // O_NONBLOCK: opening a FIFO must not wait for its writer.
    Fd fd(retry([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); }));
    if (!fd) {
        if (errno == ENXIO) throw Error(Kind::bad_file, "is a socket or a device, not a regular file").in(path);
        throw os_error(errno, "open", path);
    }
    struct stat st;
    if (::fstat(fd.get(), &st) != 0) throw os_error(errno, "stat", path);
    if (!S_ISREG(st.st_mode)) throw Error(Kind::bad_file, kind_name(st.st_mode)).in(path);
    const Identity identity = identity_of(st);
    if (expected) check_same(path, *expected, identity);
    return {std::move(fd), path, identity};
}

// A second descriptor of the same file with O_DIRECT, or none where the file system refuses it.
Fd open_direct(const OpenedFile& file) {
    Fd fd(retry([&] { return ::open(file.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | O_DIRECT); }));
    if (!fd) {
        if (errno == EINVAL) return fd;
        throw os_error(errno, "open", file.path);
    }
    struct stat st;
    if (::fstat(fd.get(), &st) != 0) throw os_error(errno, "stat", file.path);
    check_same(file.path, file.identity, identity_of(st));
    return fd;
}

}  // namespace

Io io_from_name(const std::string& name) {
    if (name == "auto") return Io::automatic;
    if (name == "mmap") return Io::mapped;
    if (name == "pread") return Io::positional;
    if (name == "direct") return Io::direct;
    throw Error(Kind::bad_plan, "unknown way to read and write").on("io").got(name).want("auto, mmap, pread or direct");
}

Error truncated(const std::string& path, int fd, std::uint64_t size) {
    Error error(Kind::source_changed, "truncated");
    error.in(path).want(bytes_text(size));
    struct stat st;
    if (::fstat(fd, &st) == 0) error.got(bytes_text(static_cast<std::uint64_t>(st.st_size)));
    return error;
}

Source::~Source() { ::close(fd_); }

void Source::check_range(std::uint64_t offset, std::uint64_t nbytes) const {
    if (nbytes > size() || offset > size() - nbytes)
        throw Error(Kind::bad_file, "a range beyond the end of the file")
            .in(path_)
            .at(offset)
            .got(bytes_text(size()))
            .want("at least " + bytes_text(nbytes) + " from there");
}

void Source::check_unchanged() const {
    struct stat st;
    if (::fstat(fd_, &st) != 0) throw os_error(errno, "stat", path_);
    check_same(path_, identity_, identity_of(st));
    if (::stat(path_.c_str(), &st) != 0) {
        if (errno == ENOENT || errno == ENOTDIR) throw Error(Kind::source_changed, "gone").in(path_);
        throw os_error(errno, "stat", path_);
    }
    check_same(path_, identity_, identity_of(st));
}

std::unique_ptr<Source> open_source(const std::string& path, Io io, const Identity* expected) {
    OpenedFile file = open_regular(path, expected);
    if (io == Io::mapped) return std::make_unique<MappedSource>(std::move(file));
    const bool direct = io == Io::direct || (io == Io::automatic && !has_dontcache(file.fd.get(), file.identity.size));
    if (direct)
        if (Fd fd = open_direct(file)) return std::make_unique<DirectSource>(std::move(file), std::move(fd));
    return std::make_unique<PositionalSource>(std::move(file));
}

Mapping::Mapping(const std::string& path, const Identity& expected) {
    const OpenedFile file = open_regular(path, &expected);
    size_ = static_cast<std::size_t>(file.identity.size);
    if (size_ == 0) return;
    void* map = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.fd.get(), 0);
    if (map == MAP_FAILED) throw os_error(errno, "map", path);
    data_ = static_cast<const std::byte*>(map);
}

Mapping::~Mapping() {
    if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

}  // namespace pgs
