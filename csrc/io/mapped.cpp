#include "io/readers.hpp"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cstring>

#include "base/error.hpp"

namespace pgs {

MappedSource::MappedSource(OpenedFile file) : PositionalSource(std::move(file)), mapping_(path_, identity_) {
    // No read-ahead and no fault-around: read_at asks for exactly the pages of its range.
    if (size() > 0) ::madvise(const_cast<std::byte*>(mapping_.bytes().data()), size(), MADV_RANDOM);
}

void MappedSource::read_at(std::uint64_t offset, std::span<std::byte> out) {
    check_range(offset, out.size());
    if (out.empty()) return;
    // Touching a page beyond the end of a shortened file is SIGBUS; this leaves only a race of microseconds.
    struct stat st;
    if (::fstat(fd_, &st) != 0) throw os_error(errno, "stat", path_);
    if (static_cast<std::uint64_t>(st.st_size) < size()) throw truncated(path_, fd_, size()).at(offset);
    const std::uint64_t page = page_bytes();
    const std::uint64_t begin = offset / page * page;
    auto* const pages = const_cast<std::byte*>(mapping_.bytes().data() + begin);
    const std::size_t length = offset + out.size() - begin;
    guard_.touch(offset, out.size());
    ::madvise(pages, length, MADV_WILLNEED);
    std::memcpy(out.data(), mapping_.bytes().data() + offset, out.size());
    ::madvise(pages, length, MADV_DONTNEED);  // a mapped page counts as ours in RSS and cannot leave the cache
}

}  // namespace pgs
