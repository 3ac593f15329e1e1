// The place of an output file: its folder, its name there, and the hidden names beside it.
#pragma once
#include <sys/stat.h>

#include <optional>
#include <string>
#include <vector>

#include "io/sink.hpp"
#include "io/sys.hpp"

namespace pgs {

struct Target {
    std::string path;  // as asked for, for messages
    std::string folder_path, name;  // after following symbolic links
    Fd folder;
};

// Follows symbolic links of the last component, so that a link stays and the file it names is written.
Target resolve_target(const std::string& path);

// What is at the target now, or nothing. Error if the output must not go there; see create_sink.
std::optional<struct stat> examine_target(const Target& target, const SinkOptions& options);

// A fresh name for a hidden file beside the target: ".NAME.pgs-tmp-PID-RANDOM".
std::string hidden_name(const Target& target);

// Removes hidden files of this target that killed runs left: those that no process holds by flock.
void remove_stale(const Target& target);

// True if this descriptor now holds the lock and `name` in the folder is still its file.
bool lock_named(int fd, const Target& target, const std::string& name);

}  // namespace pgs
