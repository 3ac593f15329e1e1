#include "io/target.hpp"

#include <dirent.h>
#include <sys/file.h>
#include <sys/random.h>

#include <algorithm>
#include <cctype>
#include <climits>

#include "base/error.hpp"

namespace pgs {
namespace {

std::string read_link(const std::string& path) {
    char text[PATH_MAX];
    const ssize_t n = ::readlink(path.c_str(), text, sizeof text);
    if (n < 0) throw os_error(errno, "read the symbolic link", path);
    return {text, static_cast<std::size_t>(n)};
}

std::string hex(std::uint64_t value) {
    std::string text(16, '0');
    for (std::size_t i = 16; i-- > 0; value >>= 4) text[i] = "0123456789abcdef"[value & 15];
    return text;
}

std::uint64_t random_bits() {
    std::uint64_t value = 0;
    if (::getrandom(&value, sizeof value, 0) != sizeof value) value = reinterpret_cast<std::uintptr_t>(&value);
    return value;
}

constexpr std::size_t name_max = 255;
constexpr std::size_t suffix_max = 10 + 1 + 16;  // PID-RANDOM

std::string hidden_prefix(const std::string& name, Hidden kind) {
    const std::string tail = kind == Hidden::temp ? ".pgs-tmp-" : ".pgs-old-";
    std::string prefix = ".";
    if (1 + name.size() + tail.size() + suffix_max <= name_max) return prefix.append(name).append(tail);
    // Too long: its beginning, cut between characters, and a hash (FNV-1a) that tells it from its neighbours.
    std::uint64_t hash = 0xcbf29ce484222325u;
    for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    std::size_t cut = name_max - 1 - tail.size() - suffix_max - 17;
    while (cut > 0 && (static_cast<unsigned char>(name[cut]) & 0xc0) == 0x80) --cut;
    return prefix.append(name, 0, cut).append("~").append(hex(hash)).append(tail);
}

// "PID-RANDOM", so that ".a.pgs-tmp-" does not claim the hidden files of a target that is itself named "a.pgs-tmp-1".
bool is_suffix(const std::string& text) {
    const std::size_t dash = text.find('-');
    if (dash == std::string::npos || dash == 0 || text.size() != dash + 17) return false;
    return std::all_of(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(dash),
                       [](unsigned char c) { return std::isdigit(c) != 0; }) &&
           std::all_of(text.begin() + static_cast<std::ptrdiff_t>(dash) + 1, text.end(),
                       [](unsigned char c) { return std::isxdigit(c) != 0; });
}

}  // namespace

Target resolve_target(const std::string& path) {
    Target target;
    target.path = path;
    if (path.empty()) throw os_error(ENOENT, "create", path);
    std::string at = path;
    for (int links = 0;; ++links) {
        const std::size_t slash = at.rfind('/');
        target.folder_path = slash == std::string::npos ? "." : slash == 0 ? "/" : at.substr(0, slash);
        target.name = slash == std::string::npos ? at : at.substr(slash + 1);
        if (target.name.empty() || target.name == "." || target.name == "..")
            throw Error(Kind::bad_plan, "the output is a folder, not a file").in(path);
        struct stat st;
        if (::lstat(at.c_str(), &st) != 0 || !S_ISLNK(st.st_mode)) break;
        if (links == 40) throw os_error(ELOOP, "create", path);
        const std::string to = read_link(at);
        at = to.starts_with('/') ? to : target.folder_path + "/" + to;
    }
    target.folder = std::make_shared<const Fd>(
        retry([&] { return ::open(target.folder_path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NONBLOCK); }));
    if (!*target.folder) {
        if (errno != ENOENT) throw os_error(errno, "open the output folder", target.folder_path);
        Error error(Kind::os, "the output folder does not exist");
        error.os_errno = ENOENT;
        throw error.in(target.folder_path);
    }
    return target;
}

std::optional<struct stat> examine_target(const Target& target, const SinkOptions& options) {
    struct stat st;
    if (::fstatat(target.folder_fd(), target.name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) {
        if (errno == ENOENT) return std::nullopt;
        throw os_error(errno, "create", target.path);
    }
    if (!S_ISREG(st.st_mode))
        throw Error(Kind::bad_plan, "the output exists and is not a regular file").in(target.path);
    for (const Identity& input : options.inputs)
        if (input.device == st.st_dev && input.inode == st.st_ino)
            throw Error(Kind::bad_plan, "the output is one of the inputs")
                .in(target.path)
                .advise("write to another file");
    if (!options.overwrite) throw os_error(EEXIST, "create", target.path);
    // The folder's permission would do, but who protected the file meant it; and a sticky folder would refuse only at
    // the end of the run.
    if (::faccessat(target.folder_fd(), target.name.c_str(), W_OK, AT_EACCESS) != 0) {
        if (errno == ENOENT) return std::nullopt;  // another run has just moved it aside
        throw os_error(errno, "replace", target.path);
    }
    return st;
}

std::string hidden_name(const Target& target, Hidden kind) {
    return hidden_prefix(target.name, kind) + std::to_string(::getpid()) + "-" + hex(random_bits());
}

bool lock_named(int fd, const Target& target, const std::string& name) {
    // A file system without flock answers something else than EWOULDBLOCK; there nobody can lock, so nobody removes.
    if (::flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) return false;
    struct stat mine, named;
    return ::fstat(fd, &mine) == 0 && S_ISREG(mine.st_mode) &&
           ::fstatat(target.folder_fd(), name.c_str(), &named, AT_SYMLINK_NOFOLLOW) == 0 &&
           mine.st_dev == named.st_dev && mine.st_ino == named.st_ino;
}

void remove_stale(const Target& target, Hidden kind) {
    // A descriptor of its own: closedir closes it.
    const int folder = ::openat(target.folder_fd(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return;
    std::unique_ptr<DIR, int (*)(DIR*)> entries(::fdopendir(folder), ::closedir);
    if (!entries) {
        ::close(folder);
        return;
    }
    const std::string prefix = hidden_prefix(target.name, kind);
    while (const dirent* entry = ::readdir(entries.get())) {
        const std::string name = entry->d_name;
        if (!name.starts_with(prefix) || !is_suffix(name.substr(prefix.size()))) continue;
        const Fd fd(::openat(folder, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
        if (!fd || ::flock(fd.get(), LOCK_EX | LOCK_NB) != 0 || !lock_named(fd.get(), target, name)) continue;
        ::unlinkat(folder, name.c_str(), 0);
    }
}

}  // namespace pgs
