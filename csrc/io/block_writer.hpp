// Positional writes of every byte of a file exactly once, in any order, from any thread; the page cache is left alone.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <span>
#include <string>

#include "io/source.hpp"
#include "io/sys.hpp"

namespace pgs {

// Only whole blocks are written: O_DIRECT demands it, and a buffered write of a part of a page that has left the cache
// would read it back. The parts at the edges of a write are kept until their block is complete.
// The descriptor must outlive the writer, whose finish() is called last, from one thread.
class BlockWriter {
public:
    BlockWriter(int fd, std::string path, std::uint64_t size, Io io);
    void write_at(std::uint64_t offset, std::span<const std::byte> data);
    // Writes what is left; Error(bad_plan) if bytes are missing. No fsync.
    void finish();

private:
    enum class Way { dontcache, direct, plain };
    struct Block {
        PageBuffer bytes;
        std::size_t filled = 0;
    };
    struct Range {
        std::uint64_t offset, nbytes;
    };

    void gather(std::uint64_t offset, std::span<const std::byte> data);
    void put(std::uint64_t offset, std::span<const std::byte> data);
    void write_behind(std::uint64_t offset, std::uint64_t nbytes, bool drop);

    const int fd_;
    const std::string path_;
    const std::uint64_t size_;
    const std::uint64_t block_ = page_bytes();
    std::atomic<Way> way_{Way::plain};
    std::atomic<std::uint64_t> written_{0};

    std::mutex mutex_;                        // guards all below
    std::map<std::uint64_t, Block> pending_;  // by the offset of the block
    Block tail_;                              // the last block, not whole, which O_DIRECT cannot write
    std::deque<Range> dirty_;                 // written, and perhaps still only in memory; oldest first
    std::uint64_t dirty_bytes_ = 0;
};

}  // namespace pgs
