// Leaves the page cache as it was found: what reads of a file brought in is dropped, what was there before stays.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace pgs {

// Notes which pages are resident before the first read near them, and drops the others a little later, and the last of
// them in its destructor. Later, because a page under another thread's read cannot be dropped, and because read-ahead
// may bring in a page again: dropping after every read, or forbidding read-ahead, halves the speed. Even RWF_DONTCACHE
// needs this: with several readers 3 % of a file stayed.
// The kernel tells what is resident only to the file's owner and to who may write it; for others nothing is dropped
// here. The descriptor must outlive the guard. Any thread may call touch().
class CacheGuard {
public:
    CacheGuard(int fd, std::uint64_t file_bytes);
    ~CacheGuard();
    CacheGuard(const CacheGuard&) = delete;
    CacheGuard& operator=(const CacheGuard&) = delete;
    // Before a read of this range.
    void touch(std::uint64_t offset, std::uint64_t nbytes);

private:
    // More than any sane read-ahead, so that it does not reach over an examined part into an unknown one.
    static constexpr std::uint64_t part_bytes = 32u << 20;
    using Absent = std::vector<bool>;  // by page of a part

    Absent examine(std::uint64_t part) const;
    void drop(std::uint64_t part, const Absent& absent) const;

    const int fd_;
    const std::uint64_t file_bytes_;
    bool known_ = true;

    std::mutex mutex_;                          // guards all below
    std::map<std::uint64_t, Absent> absent_;    // never changed once it is there
    std::set<std::uint64_t> recent_, earlier_;  // parts read in this and in the last `part_bytes` of reads
    std::uint64_t recent_bytes_ = 0;
};

}  // namespace pgs
