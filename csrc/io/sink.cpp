#include "io/sink.hpp"

#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cstdio>
#include <limits>

#include "base/error.hpp"
#include "io/block_writer.hpp"
#include "io/target.hpp"

namespace pgs {
namespace {

// A temp file, flocked as long as it is open. Without a name it vanishes by itself, however the process ends.
struct Temp {
    Fd fd;
    std::string name;  // empty for O_TMPFILE
};

std::string proc_path(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

// 0666: the umask of the process decides, as for any new file.
Temp make_temp(const Target& target) {
    const int folder = target.folder.get();
    if (!switched_off("PGS_TMPFILE")) {
        Fd fd(retry([&] { return ::openat(folder, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0666); }));
        if (fd) {
            ::flock(fd.get(), LOCK_EX | LOCK_NB);
            // It gets its name through /proc, which a container may lack.
            if (::access(proc_path(fd.get()).c_str(), F_OK) == 0) return {std::move(fd), ""};
        } else if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL && errno != ENOENT) {
            throw os_error(errno, "create", target.path);
        }
    }
    for (;;) {
        std::string name = hidden_name(target);
        Fd fd(retry([&] {
            return ::openat(folder, name.c_str(), O_CREAT | O_EXCL | O_NOFOLLOW | O_RDWR | O_CLOEXEC, 0666);
        }));
        if (!fd) {
            if (errno == EEXIST) continue;
            throw os_error(errno, "create", target.path);
        }
        // Another run's remove_stale may have taken it before the lock.
        if (lock_named(fd.get(), target, name)) return {std::move(fd), std::move(name)};
        ::unlinkat(folder, name.c_str(), 0);
    }
}

std::string bytes_text(std::uint64_t n) { return std::to_string(n) + " bytes"; }

Error no_space(int os_errno, const Target& target, std::uint64_t size, std::uint64_t available,
               const std::string& hint) {
    Error error(Kind::out_of_space, "no space for the output");
    if (available < size) error.problem += ": " + bytes_text(size - available) + " missing";
    error.os_errno = os_errno;
    return error.in(target.path).got(bytes_text(available)).want(bytes_text(size)).advise(hint);
}

// Takes the space now: a full disk is an error before the first byte, not after an hour.
void reserve(int fd, const Target& target, std::uint64_t size) {
    if (size == 0) return;
    const std::string limit_hint = "the file size limit (ulimit -f) of this process is too small";
    struct rlimit limit;
    // Beyond this limit the kernel sends SIGXFSZ, which kills a process that does not ignore it.
    if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && size > limit.rlim_cur)
        throw no_space(EFBIG, target, size, limit.rlim_cur, limit_hint);
    if (size > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max()))
        throw no_space(EFBIG, target, size, static_cast<std::uint64_t>(std::numeric_limits<off_t>::max()),
                       "no file can be that long");

    struct statvfs fs;
    if (::fstatvfs(fd, &fs) != 0) throw os_error(errno, "examine the file system", target.path);
    const std::uint64_t unit = fs.f_frsize ? fs.f_frsize : fs.f_bsize;
    const std::uint64_t available = fs.f_bavail * unit;
    const std::string space_hint = "free some space in " + target.folder_path + " or write elsewhere";
    // Who may use the blocks reserved for root is known only to the kernel, so fallocate decides about those.
    if (size > fs.f_bfree * unit) throw no_space(ENOSPC, target, size, available, space_hint);
    if (retry([&] { return ::fallocate(fd, 0, 0, static_cast<off_t>(size)); }) == 0) return;
    if (errno == ENOSPC || errno == EDQUOT) throw no_space(errno, target, size, available, space_hint);
    if (errno != EOPNOTSUPP && errno != ENOSYS) throw os_error(errno, "reserve space", target.path);
    if (size > available) throw no_space(ENOSPC, target, size, available, space_hint);
    if (retry([&] { return ::ftruncate(fd, static_cast<off_t>(size)); }) != 0)
        throw os_error(errno, "reserve space", target.path);
}

class FileSink : public Sink {
public:
    FileSink(Target target, SinkOptions options, Temp temp, std::uint64_t size)
        : target_(std::move(target)),
          options_(std::move(options)),
          temp_(std::move(temp)),
          writer_(temp_.fd.get(), target_.path, size, options_.io) {}

    ~FileSink() override { remove_temp(); }

    void reserve_space(std::uint64_t size) { reserve(temp_.fd.get(), target_, size); }

    void write_at(std::uint64_t offset, std::span<const std::byte> data) override { writer_.write_at(offset, data); }

    void commit() override {
        try {
            writer_.finish();
            const auto old = examine_target(target_, options_);
            if (old) keep_owner_and_mode(*old);
            const int fd = temp_.fd.get();
            if (::fsync(fd) != 0) throw os_error(errno, "write to the disk", target_.path);
            ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
            if (old || !place_new()) place_over();
        } catch (...) {
            remove_temp();
            throw;
        }
        // The output is complete; without this a power cut may still bring back the old one.
        if (::fsync(target_.folder.get()) != 0)
            throw os_error(errno, "write the folder to the disk", target_.folder_path);
    }

private:
    void remove_temp() noexcept {
        if (!temp_.name.empty()) ::unlinkat(target_.folder.get(), temp_.name.c_str(), 0);
        temp_.name.clear();
    }

    // Only root may give a file away; others keep at least the group if they may.
    void keep_owner_and_mode(const struct stat& old) {
        const int fd = temp_.fd.get();
        const bool owned = ::fchown(fd, old.st_uid, old.st_gid) == 0 ||
                           ::fchown(fd, static_cast<uid_t>(-1), old.st_gid) == 0;
        static_cast<void>(owned);
        if (::fchmod(fd, old.st_mode & 0777) != 0 && errno != EPERM && errno != EOPNOTSUPP)
            throw os_error(errno, "set the mode", target_.path);
    }

    int link_to(const std::string& name) {
        return ::linkat(AT_FDCWD, proc_path(temp_.fd.get()).c_str(), target_.folder.get(), name.c_str(),
                        AT_SYMLINK_FOLLOW);
    }

    // Gives the output its name where none is; false if one has appeared and may be replaced.
    bool place_new() {
        const int folder = target_.folder.get();
        const bool done = temp_.name.empty() ? link_to(target_.name) == 0 : rename_if_absent(folder) == 0;
        if (!done) {
            if (errno != EEXIST) throw os_error(errno, "create", target_.path);
            if (const auto old = examine_target(target_, options_)) keep_owner_and_mode(*old);
            return false;
        }
        temp_.name.clear();
        return true;
    }

    int rename_if_absent(int folder) {
        const char* from = temp_.name.c_str();
        const char* to = target_.name.c_str();
        int result = ::renameat2(folder, from, folder, to, RENAME_NOREPLACE);
        if (result == 0 || (errno != EINVAL && errno != ENOSYS)) return result;
        result = ::linkat(folder, from, folder, to, 0);
        if (result == 0) return ::unlinkat(folder, from, 0);
        if (errno != EPERM && errno != EOPNOTSUPP) return result;
        // No way to do both at once on this file system: examine_target has just found nothing there.
        return ::renameat(folder, from, folder, to);
    }

    void place_over() {
        const int folder = target_.folder.get();
        while (temp_.name.empty()) {  // a file without a name can be linked, and a link cannot replace
            std::string name = hidden_name(target_);
            if (link_to(name) == 0)
                temp_.name = std::move(name);
            else if (errno != EEXIST)
                throw os_error(errno, "create", target_.path);
        }
        if (::renameat(folder, temp_.name.c_str(), folder, target_.name.c_str()) != 0)
            throw os_error(errno, "replace", target_.path);
        temp_.name.clear();
    }

    Target target_;
    SinkOptions options_;
    Temp temp_;
    BlockWriter writer_;
};

}  // namespace

std::unique_ptr<Sink> create_sink(const std::string& path, std::uint64_t size, const SinkOptions& options) {
    Target target = resolve_target(path);
    examine_target(target, options);
    remove_stale(target);
    Temp temp = make_temp(target);
    auto sink = std::make_unique<FileSink>(std::move(target), options, std::move(temp), size);
    sink->reserve_space(size);
    return sink;
}

}  // namespace pgs
