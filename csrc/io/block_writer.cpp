#include "io/block_writer.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/error.hpp"

namespace pgs {

BlockWriter::BlockWriter(int fd, std::string path, std::uint64_t size, Io io)
    : fd_(fd), path_(std::move(path)), size_(size) {
    const bool dontcache = io != Io::direct && has_dontcache(fd, size);
    const bool direct = !dontcache && (io == Io::direct || io == Io::automatic) && set_direct(fd, true);
    if (direct)
        way_ = Way::direct;
    else if (dontcache || (io == Io::direct && has_dontcache(fd, size)))
        way_ = Way::dontcache;
}

void BlockWriter::write_at(std::uint64_t offset, std::span<const std::byte> data) {
    if (data.size() > size_ || offset > size_ - data.size())
        throw Error(Kind::bad_plan, "a write beyond the end of the output").in(path_).at(offset);
    const std::uint64_t nbytes = data.size();
    if (const std::uint64_t skip = offset % block_) {
        const std::size_t head = std::min<std::size_t>(block_ - skip, data.size());
        gather(offset, data.first(head));
        data = data.subspan(head);
        offset += head;
    }
    if (const std::size_t body = data.size() / block_ * block_) {
        put(offset, data.first(body));
        data = data.subspan(body);
        offset += body;
    }
    if (!data.empty()) gather(offset, data);
    written_ += nbytes;
}

void BlockWriter::gather(std::uint64_t offset, std::span<const std::byte> data) {
    const std::uint64_t start = offset / block_ * block_;
    const std::size_t length = std::min(block_, size_ - start);
    Block complete;
    {
        std::scoped_lock lock(mutex_);
        Block& block = pending_[start];
        if (!block.bytes) block.bytes = page_buffer(block_);
        std::memcpy(block.bytes.get() + (offset - start), data.data(), data.size());
        block.filled += data.size();
        if (block.filled > length)
            throw Error(Kind::bad_plan, "a byte of the output was written twice").in(path_).at(offset);
        if (block.filled < length) return;
        complete = std::move(block);
        pending_.erase(start);
        if (way_ == Way::direct && length < block_) {
            tail_ = std::move(complete);
            return;
        }
    }
    put(start, {complete.bytes.get(), length});
}

void BlockWriter::put(std::uint64_t offset, std::span<const std::byte> data) {
    while (!data.empty()) {
        const Way way = way_;
        auto piece = data;
        if (way == Way::direct && !direct_address(piece.data())) {
            piece = piece.first(std::min(piece.size(), bounce_bytes));
            std::memcpy(bounce_buffer(), piece.data(), piece.size());
            piece = {bounce_buffer(), piece.size()};
        }
        iovec iv{const_cast<std::byte*>(piece.data()), piece.size()};
        const int flags = way == Way::dontcache ? RWF_DONTCACHE : 0;
        const ssize_t n = ::pwritev2(fd_, &iv, 1, static_cast<off_t>(offset), flags);
        if (n < 0) {
            if (errno == EINTR) continue;
            if (way == Way::dontcache && errno == EOPNOTSUPP) {
                way_ = Way::plain;
                continue;
            }
            if (way == Way::direct && errno == EINVAL && set_direct(fd_, false)) {
                way_ = Way::plain;
                continue;
            }
            throw os_error(errno, "write", path_).at(offset);
        }
        if (n == 0) throw os_error(EIO, "write", path_).at(offset);
        const auto done = static_cast<std::uint64_t>(n);
        if (way != Way::direct) write_behind(offset, done, way == Way::plain);
        data = data.subspan(done);
        offset += done;
    }
}

// Starts writing a range back, and waits for older ones, so that at most `window` bytes of the output are in memory:
// without it the kernel lets a fast writer fill a fifth of the memory with dirty pages.
void BlockWriter::write_behind(std::uint64_t offset, std::uint64_t nbytes, bool drop) {
    constexpr std::uint64_t window = 64u << 20;
    auto sync = [&](const Range& range, unsigned flags) {
        const auto start = static_cast<off_t>(range.offset), length = static_cast<off_t>(range.nbytes);
        if (retry([&] { return ::sync_file_range(fd_, start, length, flags); }) == 0) return;
        // A failed write-back that is reported here is not reported again by fsync.
        if (errno != EINVAL && errno != ENOSYS && errno != ESPIPE && errno != EOPNOTSUPP)
            throw os_error(errno, "write", path_).at(range.offset);
    };
    // RWF_DONTCACHE starts it by itself.
    if (drop) sync({offset, nbytes}, SYNC_FILE_RANGE_WRITE);
    std::vector<Range> old;
    {
        std::scoped_lock lock(mutex_);
        dirty_.push_back({offset, nbytes});
        dirty_bytes_ += nbytes;
        while (dirty_bytes_ > window) {
            old.push_back(dirty_.front());
            dirty_bytes_ -= dirty_.front().nbytes;
            dirty_.pop_front();
        }
    }
    for (const Range& range : old) {
        sync(range, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
        if (drop)
            ::posix_fadvise(fd_, static_cast<off_t>(range.offset), static_cast<off_t>(range.nbytes),
                            POSIX_FADV_DONTNEED);
    }
}

void BlockWriter::finish() {
    if (written_ != size_)
        throw Error(Kind::bad_plan, written_ < size_ ? "bytes of the output are missing" : "bytes were written twice")
            .in(path_)
            .got(bytes_text(written_))
            .want(bytes_text(size_));
    if (!tail_.bytes) return;
    if (!set_direct(fd_, false)) throw os_error(errno, "write", path_);
    way_ = Way::plain;
    put(size_ / block_ * block_, {tail_.bytes.get(), tail_.filled});
    tail_ = {};
}

}  // namespace pgs
