// Output files that belong together: the shards of a model.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "io/sink.hpp"

namespace pgs {

class FileSink;

struct SinkFile {
    std::string path;
    std::uint64_t size;
};

// Life: create (every target examined, the space of all files reserved) -> write_at from any thread -> finish(i), from
// any thread, when all of file i is written -> commit, last, from one thread. Of one file it is a Sink.
//
// Several names cannot change at once. What holds for a set, whose first file is what makes the others a model:
// - Nothing changes under the names before the data of all files is on the disk.
// - At no instant is the first file of one set there with another file of another set. First the old first file gets a
//   hidden name, ".NAME.pgs-old-*", so that nothing can be loaded; then file by file the old one gets such a name and
//   the new one its place; the new first file comes last. Folders are synced in between, for the sake of power cuts.
// - An error takes all of that back: the old files are there again, the new ones are gone. Should even that fail, the
//   first file stays away and the error says under which names the old files are.
// - A process killed in the middle leaves each old file under its name or its hidden one. Only the next run that
//   completes the set with `overwrite` removes the hidden ones.
// - Commits of sets whose first files are in one folder wait for each other (flock of the folder).
class SinkSet {
public:
    // Errors as of create_sink, and: two files at the same place (Error(bad_plan)); too many open files. A set that is
    // too large together is Error(out_of_space) with the bytes that all files on that file system need.
    SinkSet(const std::vector<SinkFile>& files, const SinkOptions& options);
    ~SinkSet();
    SinkSet(const SinkSet&) = delete;
    SinkSet& operator=(const SinkSet&) = delete;
    void write_at(std::size_t file, std::uint64_t offset, std::span<const std::byte> data);
    // May be left to commit. Early, it lets go of the file's memory in the page cache and overlaps its fsync with work.
    void finish(std::size_t file);
    void commit();

private:
    void create(const std::vector<SinkFile>& files, const SinkOptions& options);
    void place_all();
    bool take_back();
    std::string kept_as(std::string text) const;
    void sync_folders();

    std::vector<std::unique_ptr<FileSink>> sinks_;
    const bool overwrite_;
};

}  // namespace pgs
