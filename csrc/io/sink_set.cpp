#include "io/sink_set.hpp"

#include <sys/file.h>
#include <sys/stat.h>

#include <chrono>
#include <limits>
#include <map>
#include <set>
#include <thread>
#include <utility>

#include "base/checked.hpp"
#include "base/error.hpp"
#include "io/file_sink.hpp"

namespace pgs {
namespace {

// Held while names change, so that of two sets at one place the files never mix.
class FolderLock {
public:
    explicit FolderLock(const Target& target) : fd_(target.folder_fd()) {
        constexpr std::chrono::milliseconds patience(30'000), step(10);
        for (std::chrono::milliseconds waited(0); ::flock(fd_, LOCK_EX | LOCK_NB) != 0; waited += step) {
            if (errno != EWOULDBLOCK) return;  // a file system without it
            if (waited >= patience)
                throw os_error(EWOULDBLOCK, "lock the folder", target.folder_path)
                    .advise("another program keeps it locked (flock)");
            std::this_thread::sleep_for(step);
        }
    }
    ~FolderLock() { ::flock(fd_, LOCK_UN); }
    FolderLock(const FolderLock&) = delete;
    FolderLock& operator=(const FolderLock&) = delete;

private:
    int fd_;
};

std::uint64_t add(std::uint64_t a, std::uint64_t b) {
    return checked_add(a, b).value_or(std::numeric_limits<std::uint64_t>::max());
}

using FileId = std::pair<dev_t, ino_t>;

FileId file_id(int fd, const std::string& path) {
    struct stat st;
    if (::fstat(fd, &st) != 0) throw os_error(errno, "examine", path);
    return {st.st_dev, st.st_ino};
}

}  // namespace

SinkSet::SinkSet(const std::vector<SinkFile>& files, const SinkOptions& options) : overwrite_(options.overwrite) {
    if (files.empty()) throw Error(Kind::bad_plan, "no output file");
    if (files.size() == 1) {
        sinks_.push_back(create_file_sink(files[0].path, files[0].size, options));
        return;
    }
    try {
        create(files, options);
    } catch (Error& error) {
        if (error.os_errno == EMFILE || error.os_errno == ENFILE)
            error.advise("write fewer, larger shards, or raise the limit of open files (ulimit -n)");
        throw;
    }
}

SinkSet::~SinkSet() = default;

void SinkSet::create(const std::vector<SinkFile>& files, const SinkOptions& options) {
    std::vector<Target> targets;
    std::map<FileId, std::shared_ptr<const Fd>> folders;
    std::set<std::pair<const Fd*, std::string>> places;
    std::set<FileId> old_files;
    for (const SinkFile& file : files) {
        Target target = resolve_target(file.path);
        const FileId folder = file_id(target.folder_fd(), target.folder_path);
        target.folder = folders.try_emplace(folder, target.folder).first->second;
        const auto old = examine_target(target, options);
        if (!places.emplace(target.folder.get(), target.name).second ||
            (old && !old_files.emplace(old->st_dev, old->st_ino).second))
            throw Error(Kind::bad_plan, "two outputs are the same file").in(target.path);
        targets.push_back(std::move(target));
    }
    // One who locks the folder for long would be an error of commit, when all the work is done.
    { const FolderLock briefly(targets[0]); }
    for (const Target& target : targets) remove_stale(target, Hidden::temp);
    for (std::size_t i = 0; i < files.size(); ++i)
        sinks_.push_back(std::make_unique<FileSink>(std::move(targets[i]), options, files[i].size));

    std::vector<dev_t> disks;
    std::map<dev_t, std::uint64_t> needed;
    for (std::size_t i = 0; i < files.size(); ++i) {
        disks.push_back(file_id(sinks_[i]->fd(), files[i].path).first);
        std::uint64_t& sum = needed[disks[i]];
        sum = add(sum, files[i].size);
    }
    for (std::size_t i = 0; i < files.size(); ++i) {
        sinks_[i]->reserve_space(needed[disks[i]]);
        needed[disks[i]] -= files[i].size;
    }
}

void SinkSet::write_at(std::size_t file, std::uint64_t offset, std::span<const std::byte> data) {
    sinks_[file]->write_at(offset, data);
}

void SinkSet::finish(std::size_t file) { sinks_[file]->finish(); }

void SinkSet::commit() {
    if (sinks_.size() == 1) return sinks_[0]->commit();
    for (auto& sink : sinks_) sink->finish();
    const FolderLock lock(sinks_[0]->target());
    try {
        place_all();
    } catch (Error& error) {
        if (!take_back()) error.advise(kept_as("it could not be undone"));
        throw;
    } catch (...) {
        take_back();
        throw;
    }
    try {
        sync_folders();
    } catch (Error& error) {
        error.advise(kept_as("the new files are there"));
        throw;
    }
    for (auto& sink : sinks_) {
        sink->drop_old();
        if (overwrite_) remove_stale(sink->target(), Hidden::old);
    }
}

void SinkSet::place_all() {
    for (auto& sink : sinks_) sink->examine();  // all of them before the first change
    sinks_[0]->step_aside();
    sync_folders();  // even if it was not there: a killed run may just have moved it
    for (std::size_t i = sinks_.size(); i-- > 1;) {
        sinks_[i]->step_aside();
        sinks_[i]->place_alone();
    }
    sync_folders();
    sinks_[0]->place_alone();
}

// True if everything is as it was. The old first file comes back when all others have.
bool SinkSet::take_back() {
    bool clean = sinks_[0]->withdraw();
    for (std::size_t i = 1; i < sinks_.size(); ++i) clean &= sinks_[i]->withdraw() && sinks_[i]->restore();
    try {
        sync_folders();
    } catch (...) {  // NOLINT(bugprone-empty-catch): may be why all of this is taken back
    }
    return clean && sinks_[0]->restore();
}

std::string SinkSet::kept_as(std::string text) const {
    const char* separator = "; the old files are kept as ";
    for (const auto& sink : sinks_) {
        if (sink->old_name().empty()) continue;
        text += separator + sink->target().folder_path + "/" + sink->old_name();
        separator = ", ";
    }
    return text;
}

void SinkSet::sync_folders() {
    const Fd* last = nullptr;
    for (auto& sink : sinks_) {
        if (sink->target().folder.get() != last) sink->sync_folder();
        last = sink->target().folder.get();
    }
}

}  // namespace pgs
