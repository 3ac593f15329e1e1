#include "io/residency.hpp"

#include <fcntl.h>
#include <sys/mman.h>

#include "io/sys.hpp"

namespace pgs {

std::vector<PageRun> absent_pages(int fd, std::uint64_t offset, std::uint64_t nbytes) {
    std::vector<PageRun> runs;
    if (nbytes == 0) return runs;
    const std::uint64_t page = page_bytes();
    const std::uint64_t begin = offset / page * page;
    const std::uint64_t pages = (offset + nbytes - begin + page - 1) / page;
    void* map = ::mmap(nullptr, pages * page, PROT_READ, MAP_SHARED, fd, static_cast<off_t>(begin));
    if (map == MAP_FAILED) return runs;
    std::vector<unsigned char> resident(pages);
    const bool known = ::mincore(map, pages * page, resident.data()) == 0;
    ::munmap(map, pages * page);
    if (!known) return runs;
    for (std::uint64_t i = 0; i < pages; ++i) {
        if (resident[i] & 1) continue;
        const std::uint64_t at = begin + i * page;
        if (!runs.empty() && runs.back().offset + runs.back().nbytes == at)
            runs.back().nbytes += page;
        else
            runs.push_back({at, page});
    }
    return runs;
}

void drop_pages(int fd, const std::vector<PageRun>& runs) {
    for (const PageRun& run : runs)
        ::posix_fadvise(fd, static_cast<off_t>(run.offset), static_cast<off_t>(run.nbytes), POSIX_FADV_DONTNEED);
}

}  // namespace pgs
