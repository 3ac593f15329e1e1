#include "base/parallel.hpp"

#include <sched.h>

#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.hpp"

namespace pgs {

namespace {
thread_local const Cancel* worker_cancel = nullptr;
}

const Cancel* Cancel::of_this_thread() noexcept { return worker_cancel; }

void Cancel::check() const {
    if (requested()) throw Error(Kind::cancelled, "cancelled");
}

int thread_count(int asked) {
    constexpr int limit = 1024;
    if (asked > limit || asked < 0)
        throw Error(Kind::bad_plan, "not a number of threads")
            .on("threads")
            .got(std::to_string(asked))
            .want("0 to 1024");
    if (asked > 0) return asked;
    if (const char* text = std::getenv("PGS_THREADS"); text && *text) {
        char* end = nullptr;
        const long n = std::strtol(text, &end, 10);
        if (*end || n < 1 || n > limit)
            throw Error(Kind::bad_plan, "not a number of threads").on("PGS_THREADS").got(text).want("1 to 1024");
        return static_cast<int>(n);
    }
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    const unsigned n = std::thread::hardware_concurrency();
    return n ? static_cast<int>(n) : 1;
}

void do_here(const std::function<void()>& work) {
    class Environment {
    public:
        Environment() {
            std::fegetenv(&before_);
            std::fesetenv(FE_DFL_ENV);
        }
        ~Environment() { std::fesetenv(&before_); }
        Environment(const Environment&) = delete;
        Environment& operator=(const Environment&) = delete;

    private:
        std::fenv_t before_{};
    };
    const Environment environment;
    work();
}

void parallel_for(int threads, std::uint64_t items, Cancel& cancel, const std::function<void(int, std::uint64_t)>& work,
                  const std::function<void()>& poll, int poll_ms) {
    std::atomic<std::uint64_t> next{0};
    std::mutex mutex;
    std::condition_variable done_cv;
    int running = 0;
    std::exception_ptr error;
    std::uint64_t error_item = UINT64_MAX;

    auto body = [&](int worker) {
        worker_cancel = &cancel;
        // A thread inherits the rounding mode and flush-to-zero of the one that made it; the bytes must not depend on them.
        std::fesetenv(FE_DFL_ENV);
        while (!cancel.requested()) {
            const std::uint64_t item = next.fetch_add(1, std::memory_order_relaxed);
            if (item >= items) break;
            try {
                work(worker, item);
            } catch (...) {
                std::scoped_lock lock(mutex);
                // Those before it were handed out already and are finished, so that the error does not depend on luck.
                next.store(items, std::memory_order_relaxed);
                if (item < error_item) {
                    error = std::current_exception();
                    error_item = item;
                }
            }
        }
        std::scoped_lock lock(mutex);
        if (--running == 0) done_cv.notify_all();
    };

    std::vector<std::thread> pool;
    std::exception_ptr poll_error;
    try {
        pool.reserve(static_cast<std::size_t>(threads));
        for (int i = 0; i < threads && std::cmp_less(i, items); ++i) {
            {
                std::scoped_lock lock(mutex);
                ++running;
            }
            try {
                pool.emplace_back(body, i);
            } catch (const std::system_error&) {  // a limit on threads: fewer do it too
                std::scoped_lock lock(mutex);
                --running;
                if (i == 0) throw;
                break;
            }
        }
        std::unique_lock lock(mutex);
        while (!done_cv.wait_for(lock, std::chrono::milliseconds(poll_ms), [&] { return running == 0; })) {
            if (!poll) continue;
            lock.unlock();
            poll();
            lock.lock();
        }
    } catch (...) {
        poll_error = std::current_exception();
        cancel.request();
    }
    for (auto& t : pool) t.join();
    if (poll_error) std::rethrow_exception(poll_error);
    if (error) std::rethrow_exception(error);
    cancel.check();
    if (poll) poll();
}

}  // namespace pgs
