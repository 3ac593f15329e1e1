// The place of an output file: its folder, its name there, and the hidden names beside it.
#pragma once
#include <sys/stat.h>

#include <memory>
#include <optional>
#include <string>

#include "io/sink.hpp"
#include "io/sys.hpp"

namespace pgs {

struct Target {
    std::string path;                  // as asked for, for messages
    std::string folder_path, name;     // after following symbolic links
    std::shared_ptr<const Fd> folder;  // shared by the targets in one folder, since there may be hundreds

    int folder_fd() const { return folder->get(); }
};

// What a hidden file beside a target is: the output in the making, or the old file that a set of outputs moved aside.
enum class Hidden { temp, old };

// Follows symbolic links of the last component, so that a link stays and the file it names is written.
Target resolve_target(const std::string& path);

// What is at the target now, or nothing. Error if the output must not go there; see create_sink.
std::optional<struct stat> examine_target(const Target& target, const SinkOptions& options);

// A fresh name for a hidden file beside the target: ".NAME.pgs-tmp-PID-RANDOM" or ".NAME.pgs-old-PID-RANDOM".
std::string hidden_name(const Target& target, Hidden kind);

// Removes hidden files of this target that killed runs left: those that no process holds by flock.
void remove_stale(const Target& target, Hidden kind);

// True if this descriptor now holds the lock and `name` in the folder is still its file.
bool lock_named(int fd, const Target& target, const std::string& name);

}  // namespace pgs
