#include "io/file_sink.hpp"

#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <cstdio>
#include <limits>

#include "base/error.hpp"

namespace pgs {
namespace {

std::string proc_path(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

// 0666: the umask of the process decides, as for any new file.
Temp make_temp(const Target& target) {
    const int folder = target.folder_fd();
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
        std::string name = hidden_name(target, Hidden::temp);
        Fd fd(retry(
            [&] { return ::openat(folder, name.c_str(), O_CREAT | O_EXCL | O_NOFOLLOW | O_RDWR | O_CLOEXEC, 0666); }));
        if (!fd) {
            if (errno == EEXIST) continue;
            throw os_error(errno, "create", target.path);
        }
        // Another run's remove_stale may have taken it before the lock.
        if (lock_named(fd.get(), target, name)) return {std::move(fd), std::move(name)};
        ::unlinkat(folder, name.c_str(), 0);
    }
}

Error no_space(int os_errno, const Target& target, std::uint64_t size, std::uint64_t available,
               const std::string& hint) {
    Error error(Kind::out_of_space, "no space for the output");
    if (available < size) error.problem += ": " + bytes_text(size - available) + " missing";
    error.os_errno = os_errno;
    return error.in(target.path).got(bytes_text(available)).want(bytes_text(size)).advise(hint);
}

// Takes the space now: a full disk is an error before the first byte, not after an hour. `together`: of all outputs that
// still need space on this file system.
void reserve(int fd, const Target& target, std::uint64_t size, std::uint64_t together) {
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
    if (together > fs.f_bfree * unit) throw no_space(ENOSPC, target, together, available, space_hint);
    if (retry([&] { return ::fallocate(fd, 0, 0, static_cast<off_t>(size)); }) == 0) return;
    if (errno == ENOSPC || errno == EDQUOT) throw no_space(errno, target, together, available, space_hint);
    if (errno != EOPNOTSUPP && errno != ENOSYS) throw os_error(errno, "reserve space", target.path);
    if (together > available) throw no_space(ENOSPC, target, together, available, space_hint);
    if (retry([&] { return ::ftruncate(fd, static_cast<off_t>(size)); }) != 0)
        throw os_error(errno, "reserve space", target.path);
}

// Gives a file another name unless one is there (EEXIST), as renameat2 does.
int rename_if_absent(int folder, const char* from, const char* to) {
    int result = ::renameat2(folder, from, folder, to, RENAME_NOREPLACE);
    if (result == 0 || (errno != EINVAL && errno != ENOSYS)) return result;
    result = ::linkat(folder, from, folder, to, 0);
    if (result == 0) return ::unlinkat(folder, from, 0);
    if (errno != EPERM && errno != EOPNOTSUPP) return result;
    // No way to do both at once on this file system: the caller has just found nothing there.
    return ::renameat(folder, from, folder, to);
}

}  // namespace

FileSink::FileSink(Target target, SinkOptions options, std::uint64_t size)
    : target_(std::move(target)),
      options_(std::move(options)),
      temp_(make_temp(target_)),
      size_(size),
      writer_(temp_.fd.get(), target_.path, size, options_.io) {}

FileSink::~FileSink() { remove_temp(); }

void FileSink::reserve_space(std::uint64_t together) { reserve(temp_.fd.get(), target_, size_, together); }

void FileSink::write_at(std::uint64_t offset, std::span<const std::byte> data) { writer_.write_at(offset, data); }

void FileSink::finish() {
    if (finished_) return;
    writer_.finish();
    const auto old = examine_target(target_, options_);
    if (old) keep_owner_and_mode(*old);
    replaces_ = old.has_value();
    const int fd = temp_.fd.get();
    if (::fsync(fd) != 0) throw os_error(errno, "write to the disk", target_.path);
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    finished_ = true;
}

void FileSink::commit() {
    try {
        finish();
        if (replaces_ || !place_new()) place_over();
    } catch (...) {
        remove_temp();
        throw;
    }
    sync_folder();
}

// The output is complete; without this a power cut may still bring back the old one.
void FileSink::sync_folder() {
    if (::fsync(target_.folder_fd()) != 0) throw os_error(errno, "write the folder to the disk", target_.folder_path);
}

void FileSink::remove_temp() noexcept {
    if (!temp_.name.empty()) ::unlinkat(target_.folder_fd(), temp_.name.c_str(), 0);
    temp_.name.clear();
}

// Only root may give a file away; others keep at least the group if they may.
void FileSink::keep_owner_and_mode(const struct stat& old) {
    const int fd = temp_.fd.get();
    const bool owned =
        ::fchown(fd, old.st_uid, old.st_gid) == 0 || ::fchown(fd, static_cast<uid_t>(-1), old.st_gid) == 0;
    static_cast<void>(owned);
    if (::fchmod(fd, old.st_mode & 0777) != 0 && errno != EPERM && errno != EOPNOTSUPP)
        throw os_error(errno, "set the mode", target_.path);
}

int FileSink::link_to(const std::string& name) {
    return ::linkat(AT_FDCWD, proc_path(temp_.fd.get()).c_str(), target_.folder_fd(), name.c_str(), AT_SYMLINK_FOLLOW);
}

// Gives the output its name where none is; false if one has appeared.
bool FileSink::place_new() {
    const int folder = target_.folder_fd();
    const bool done = temp_.name.empty() ? link_to(target_.name) == 0
                                         : rename_if_absent(folder, temp_.name.c_str(), target_.name.c_str()) == 0;
    if (!done) {
        if (errno != EEXIST) throw os_error(errno, "create", target_.path);
        return false;
    }
    temp_.name.clear();
    return true;
}

void FileSink::place_over() {
    if (!replaces_)
        if (const auto old = examine_target(target_, options_)) keep_owner_and_mode(*old);
    const int folder = target_.folder_fd();
    while (temp_.name.empty()) {  // a file without a name can be linked, and a link cannot replace
        std::string name = hidden_name(target_, Hidden::temp);
        if (link_to(name) == 0)
            temp_.name = std::move(name);
        else if (errno != EEXIST)
            throw os_error(errno, "create", target_.path);
    }
    if (::renameat(folder, temp_.name.c_str(), folder, target_.name.c_str()) != 0)
        throw os_error(errno, "replace", target_.path);
    temp_.name.clear();
}

void FileSink::step_aside() {
    if (!examine_target(target_, options_)) return;
    std::string name = hidden_name(target_, Hidden::old);
    if (::renameat(target_.folder_fd(), target_.name.c_str(), target_.folder_fd(), name.c_str()) != 0)
        throw os_error(errno, "replace", target_.path);
    old_name_ = std::move(name);
}

void FileSink::place_alone() {
    if (!place_new()) throw os_error(EEXIST, "create", target_.path);
}

bool FileSink::withdraw() noexcept {
    struct stat mine, named;
    if (::fstat(temp_.fd.get(), &mine) != 0) return false;
    if (::fstatat(target_.folder_fd(), target_.name.c_str(), &named, AT_SYMLINK_NOFOLLOW) != 0) return errno == ENOENT;
    if (mine.st_dev != named.st_dev || mine.st_ino != named.st_ino) return true;  // somebody else's
    return ::unlinkat(target_.folder_fd(), target_.name.c_str(), 0) == 0;
}

bool FileSink::restore() noexcept {
    if (old_name_.empty()) return true;
    if (rename_if_absent(target_.folder_fd(), old_name_.c_str(), target_.name.c_str()) != 0) return false;
    old_name_.clear();
    return true;
}

void FileSink::drop_old() noexcept {
    if (!old_name_.empty()) ::unlinkat(target_.folder_fd(), old_name_.c_str(), 0);
    old_name_.clear();
}

std::unique_ptr<FileSink> create_file_sink(const std::string& path, std::uint64_t size, const SinkOptions& options) {
    Target target = resolve_target(path);
    examine_target(target, options);
    remove_stale(target, Hidden::temp);
    auto sink = std::make_unique<FileSink>(std::move(target), options, size);
    sink->reserve_space(size);
    return sink;
}

std::unique_ptr<Sink> create_sink(const std::string& path, std::uint64_t size, const SinkOptions& options) {
    return create_file_sink(path, size, options);
}

}  // namespace pgs
