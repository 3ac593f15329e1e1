// What the files of this folder share about system calls.
#pragma once
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string_view>
#include <utility>

#ifndef RWF_DONTCACHE
#define RWF_DONTCACHE 0x00000080  // Linux 6.14: buffered I/O whose pages leave the cache when it is done
#endif

namespace pgs {

// Owns a file descriptor.
class Fd {
public:
    explicit Fd(int fd = -1) noexcept : fd_(fd) {}
    ~Fd() {
        if (fd_ >= 0) ::close(fd_);
    }
    Fd(Fd&& other) noexcept : fd_(other.release()) {}
    Fd& operator=(Fd&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    int get() const noexcept { return fd_; }
    int release() noexcept { return std::exchange(fd_, -1); }
    explicit operator bool() const noexcept { return fd_ >= 0; }

private:
    int fd_;
};

// Repeats a call that a signal interrupted.
template <class Call>
auto retry(Call call) {
    auto result = call();
    while (result == -1 && errno == EINTR) result = call();
    return result;
}

// A page of the cache; also a multiple of every device's block, so the unit of O_DIRECT here.
inline std::size_t page_bytes() {
    static const auto bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    return bytes;
}

struct AlignedFree {
    void operator()(std::byte* p) const noexcept { std::free(p); }
};
using PageBuffer = std::unique_ptr<std::byte, AlignedFree>;

inline PageBuffer page_buffer(std::size_t bytes) {
    void* p = nullptr;
    if (::posix_memalign(&p, page_bytes(), bytes) != 0) throw std::bad_alloc();
    return PageBuffer(static_cast<std::byte*>(p));
}

// One aligned buffer per thread, for O_DIRECT with memory that is not aligned.
inline constexpr std::size_t bounce_bytes = std::size_t{1} << 20;
inline std::byte* bounce_buffer() {
    thread_local const PageBuffer buffer = page_buffer(bounce_bytes);
    return buffer.get();
}

// O_DIRECT wants the address of the memory at a sector boundary.
inline bool direct_address(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 512 == 0; }

inline bool switched_off(const char* variable) {
    const char* value = std::getenv(variable);
    return value && std::string_view(value) == "0";
}

// True if this file's kernel and file system know RWF_DONTCACHE. A read at the end of the file moves no data.
inline bool has_dontcache(int fd, std::uint64_t file_bytes) {
    if (switched_off("PGS_DONTCACHE")) return false;
    std::byte byte;
    iovec iv{&byte, 1};
    return retry([&] { return ::preadv2(fd, &iv, 1, static_cast<off_t>(file_bytes), RWF_DONTCACHE); }) >= 0;
}

// Sets or clears O_DIRECT on an open file; false where the file system refuses it.
inline bool set_direct(int fd, bool on) {
    const int flags = ::fcntl(fd, F_GETFL);
    return flags >= 0 && ::fcntl(fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}

}  // namespace pgs
