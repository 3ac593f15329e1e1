// Which pages of a file are in the page cache, so that a read can drop those that it brought in and no others.
#pragma once
#include <cstdint>
#include <vector>

namespace pgs {

struct PageRun {
    std::uint64_t offset, nbytes;  // whole pages
};

// The pages that [offset, offset + nbytes) touches and that are not resident now. Empty when the kernel does not tell
// (it tells only the file's owner and who may write it): then nothing is ever dropped.
std::vector<PageRun> absent_pages(int fd, std::uint64_t offset, std::uint64_t nbytes);

// Drops these runs from the page cache.
void drop_pages(int fd, const std::vector<PageRun>& runs);

}  // namespace pgs
