// The one kind of Sink, with the steps of its commit apart, for sets of outputs.
#pragma once
#include <sys/stat.h>

#include <memory>
#include <string>

#include "io/block_writer.hpp"
#include "io/sink.hpp"
#include "io/target.hpp"

namespace pgs {

// A temp file, flocked as long as it is open. Without a name it vanishes by itself, however the process ends.
struct Temp {
    Fd fd;
    std::string name;  // empty for O_TMPFILE
};

class FileSink : public Sink {
public:
    // The target has been examined. Makes the temp file and nothing else.
    FileSink(Target target, SinkOptions options, std::uint64_t size);
    ~FileSink() override;

    // `together`: bytes of all outputs of a set that still need space on this file system, this one included.
    void reserve_space(std::uint64_t together);
    void write_at(std::uint64_t offset, std::span<const std::byte> data) override;
    void commit() override;

    // --- for sets: finish all, then move old files aside and place the new ones; or undo that ---
    // Data fsync, once; after it only the name is missing. By any thread, after the last write_at has returned.
    void finish();
    void examine() const { examine_target(target_, options_); }
    void step_aside();   // gives the old file, if there is one, a hidden name
    void place_alone();  // gives the output its name; EEXIST if a file is there, even with `overwrite`
    void sync_folder();
    bool withdraw() noexcept;  // takes back place_alone; true if the new file is not at the target
    bool restore() noexcept;   // takes back step_aside; false if it fails
    void drop_old() noexcept;  // removes what step_aside has moved, after success

    const Target& target() const { return target_; }
    int fd() const { return temp_.fd.get(); }
    const std::string& old_name() const { return old_name_; }

private:
    void remove_temp() noexcept;
    void keep_owner_and_mode(const struct stat& old);
    int link_to(const std::string& name);
    bool place_new();
    void place_over();

    Target target_;
    SinkOptions options_;
    Temp temp_;
    std::uint64_t size_;
    BlockWriter writer_;
    bool finished_ = false;
    bool replaces_ = false;  // a file was at the target when finish() looked
    std::string old_name_;   // of the old file, while it is aside
};

std::unique_ptr<FileSink> create_file_sink(const std::string& path, std::uint64_t size, const SinkOptions& options);

}  // namespace pgs
