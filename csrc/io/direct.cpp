#include "io/readers.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/error.hpp"

namespace pgs {

void DirectSource::read_at(std::uint64_t offset, std::span<std::byte> out) {
    check_range(offset, out.size());
    if (!refused_.load(std::memory_order_relaxed) && read_direct(offset, out)) return;
    PositionalSource::read_at(offset, out);
}

// False if the file system refuses O_DIRECT after all; then `out` is to be filled from the start.
bool DirectSource::read_direct(std::uint64_t offset, std::span<std::byte> out) {
    const std::uint64_t page = page_bytes();
    while (!out.empty()) {
        const std::uint64_t skip = offset % page;  // bytes of the first page before `offset`
        // Straight into the caller's memory where position and address allow it, else through the bounce buffer.
        const bool straight = skip == 0 && out.size() >= page && direct_address(out.data());
        std::byte* const memory = straight ? out.data() : bounce_buffer();
        const std::size_t wanted =
            straight ? out.size() / page * page
                     : std::min<std::size_t>(bounce_bytes, (skip + out.size() + page - 1) / page * page);
        const ssize_t n =
            retry([&] { return ::pread(direct_.get(), memory, wanted, static_cast<off_t>(offset - skip)); });
        if (n < 0) {
            if (errno != EINVAL) throw os_error(errno, "read", path_).at(offset);
            refused_.store(true, std::memory_order_relaxed);
            return false;
        }
        if (std::cmp_less_equal(n, skip)) throw truncated(path_, fd_, size()).at(offset);
        const std::size_t got = std::min<std::size_t>(static_cast<std::size_t>(n) - skip, out.size());
        if (!straight) std::memcpy(out.data(), memory + skip, got);
        out = out.subspan(got);
        offset += got;
    }
    return true;
}

}  // namespace pgs
