#include "io/cache_guard.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <string>
#include <utility>

#include "io/sys.hpp"

namespace pgs {

CacheGuard::CacheGuard(int fd, std::uint64_t file_bytes) : fd_(fd), file_bytes_(file_bytes) {
    struct stat st;
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    // For others mincore calls every page resident; then at least nothing beyond what is read comes in.
    const uid_t user = ::geteuid();
    known_ = ::fstat(fd, &st) == 0 && (user == 0 || user == st.st_uid || ::access(path.c_str(), W_OK) == 0);
    if (!known_) ::posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
}

CacheGuard::~CacheGuard() {
    for (const auto& [part, absent] : absent_) drop(part, absent);
}

void CacheGuard::touch(std::uint64_t offset, std::uint64_t nbytes) {
    if (!known_ || nbytes == 0) return;
    std::set<std::uint64_t> due;
    {
        std::scoped_lock lock(mutex_);
        const std::uint64_t last = (offset + nbytes - 1) / part_bytes;
        for (std::uint64_t part = offset / part_bytes; part <= last + 1; ++part) {  // + 1: for the read-ahead
            if (part * part_bytes >= file_bytes_) break;
            if (!absent_.contains(part)) absent_.emplace(part, examine(part));
            recent_.insert(part);
        }
        recent_bytes_ += nbytes;
        if (recent_bytes_ < part_bytes) return;
        recent_bytes_ = 0;
        due = std::exchange(earlier_, std::exchange(recent_, {}));
    }
    for (const std::uint64_t part : due) {
        const Absent* absent;
        {
            std::scoped_lock lock(mutex_);
            absent = &absent_.at(part);
        }
        drop(part, *absent);
    }
}

CacheGuard::Absent CacheGuard::examine(std::uint64_t part) const {
    const std::uint64_t begin = part * part_bytes;
    const std::uint64_t nbytes = std::min(part_bytes, file_bytes_ - begin);
    const std::uint64_t pages = (nbytes + page_bytes() - 1) / page_bytes();
    void* map = ::mmap(nullptr, nbytes, PROT_READ, MAP_SHARED, fd_, static_cast<off_t>(begin));
    if (map == MAP_FAILED) return {};
    std::vector<unsigned char> resident(pages);
    const bool told = ::mincore(map, nbytes, resident.data()) == 0;
    ::munmap(map, nbytes);
    if (!told) return {};
    Absent absent(pages);
    for (std::uint64_t i = 0; i < pages; ++i) absent[i] = !(resident[i] & 1);
    return absent;
}

void CacheGuard::drop(std::uint64_t part, const Absent& absent) const {
    for (std::uint64_t i = 0; i < absent.size();) {
        std::uint64_t end = i;
        while (end < absent.size() && absent[end]) ++end;
        if (end > i)
            ::posix_fadvise(fd_, static_cast<off_t>(part * part_bytes + i * page_bytes()),
                            static_cast<off_t>((end - i) * page_bytes()), POSIX_FADV_DONTNEED);
        i = end + 1;
    }
}

}  // namespace pgs
