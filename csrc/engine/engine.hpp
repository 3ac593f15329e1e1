// The engine: moves, decodes and encodes tensor bytes as a checked plan says. It decides nothing.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/parallel.hpp"
#include "engine/tiles.hpp"

namespace pgs {

struct RunStats {
    std::uint64_t bytes_read = 0, bytes_written = 0, elements_encoded = 0;  // of tensors; importance rows do not count
    std::uint64_t buffer_bytes = 0;                                         // the most that all buffers of the run held
    int threads = 0;
};

Budget plan_budget(const Jobs& jobs, const RunOptions& options);

struct Output {
    std::string path;
    std::string header;
    std::uint64_t file_bytes;  // of the whole file
};

// Writes header, jobs and padding of each output, all of them or none; the first output is the one that makes the others
// a model (see SinkSet for what holds when names change). Everything that can be wrong with the numbers is found before
// the first byte. `poll(done, total)` runs on the calling thread about every 20 ms, with bytes of output; an exception
// from it cancels the run and leaves nothing.
RunStats run(const std::vector<std::shared_ptr<Source>>& sources, const std::vector<Output>& outputs, const Jobs& jobs,
             const RunOptions& options, Cancel& cancel,
             const std::function<void(std::uint64_t done, std::uint64_t total)>& poll);

}  // namespace pgs
