#include "quant/dispatch.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "quant/lanes/sets.hpp"

namespace pgs {

namespace {

struct Choice {
    const Kernels* set;
    bool available;
};

// ggml's own loops; what ggml has not is the scalar set's.
const Kernels ggml_set = []() noexcept {
    Kernels set = lanes::scalar::kernels;
    set.name = "ggml";
    for (auto& encode : set.encode) encode = nullptr;
    for (auto& decode : set.decode) decode = nullptr;
    return set;
}();

#if defined(__x86_64__)
// clang's __builtin_cpu_supports does not know this one.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Best first.
std::vector<Choice> choices() {
    std::vector<Choice> all;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    all.push_back({&lanes::avx512::kernels, avx512});
    all.push_back({&lanes::avx2::kernels, avx2});
    all.push_back({&lanes::sse::kernels, __builtin_cpu_supports("sse4.1") != 0});
#elif defined(__aarch64__)
    all.push_back({&lanes::neon::kernels, true});
#endif
    all.push_back({&ggml_set, true});  // before the scalar set, which is its slower twin but for the grid types
    all.push_back({&lanes::scalar::kernels, true});
    return all;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* set = chosen.load(std::memory_order_relaxed);
    return set ? *set : choose_kernels();
}

const Kernels& choose_kernels() {
    static const std::vector<Choice> all = choices();
    const char* forced = std::getenv("PGS_KERNELS");
    const std::string name = forced ? forced : "";
    for (const Choice& choice : all)
        if (name.empty() ? choice.available : name == choice.set->name) {
            if (choice.available) {
                chosen.store(choice.set, std::memory_order_relaxed);
                return *choice.set;
            }
            throw Error(Kind::unsupported, "this machine cannot run these kernels").on("PGS_KERNELS").got(name);
        }
    std::string names;
    for (const Choice& choice : all) names += (names.empty() ? "" : ", ") + std::string(choice.set->name);
    throw Error(Kind::unsupported, "no such kernels").on("PGS_KERNELS").got(name).want(names);
}

}  // namespace pgs
