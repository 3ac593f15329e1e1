// Worker threads that take work from a queue until it is empty, the first error, or a cancel.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace pgs {

// Set from any thread; workers look at it between pieces of a few milliseconds.
class Cancel {
public:
    void request() noexcept { flag_.store(true, std::memory_order_relaxed); }
    bool requested() const noexcept { return flag_.load(std::memory_order_relaxed); }
    void check() const;  // throws Error(Kind::cancelled)

    // The one of the parallel_for that this thread works for, or null.
    static const Cancel* of_this_thread() noexcept;

private:
    std::atomic<bool> flag_{false};
};

// How many threads a run uses: `asked` if positive, else PGS_THREADS, else the CPUs this process may run on.
int thread_count(int asked);

// Calls work() on this thread in the floating-point environment of a worker: for what is done in a few milliseconds.
void do_here(const std::function<void()>& work);

// Calls work(worker, item) for every item in [0, items), each once, from `threads` new threads. Items are handed out in
// ascending order, so fast cores take more. While they run the calling thread calls poll() every `poll_ms` (and once at
// the end); an exception from poll cancels the rest. After one from a worker no item is handed out any more. All threads
// are joined, then it is rethrown: of several workers' errors the one with the lowest item, the same in every run.
void parallel_for(int threads, std::uint64_t items, Cancel& cancel,
                  const std::function<void(int worker, std::uint64_t item)>& work,
                  const std::function<void()>& poll = {}, int poll_ms = 20);

}  // namespace pgs
