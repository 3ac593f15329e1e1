#include "io/readers.hpp"

#include "base/error.hpp"

namespace pgs {

PositionalSource::PositionalSource(OpenedFile file)
    : Source(std::move(file.path), file.identity, file.fd.release()),
      dontcache_(has_dontcache(fd_, size())),
      guard_(fd_, size()) {}

void PositionalSource::read_at(std::uint64_t offset, std::span<std::byte> out) {
    check_range(offset, out.size());
    guard_.touch(offset, out.size());
    for (std::uint64_t at = offset; !out.empty();) {
        iovec iv{out.data(), out.size()};
        const ssize_t n =
            retry([&] { return ::preadv2(fd_, &iv, 1, static_cast<off_t>(at), dontcache_ ? RWF_DONTCACHE : 0); });
        if (n < 0) throw os_error(errno, "read", path_).at(at);
        if (n == 0) throw truncated(path_, fd_, size()).at(at);
        out = out.subspan(static_cast<std::size_t>(n));
        at += static_cast<std::uint64_t>(n);
    }
}

}  // namespace pgs
