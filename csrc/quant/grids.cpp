#include "quant/grids.hpp"

#include <cstddef>
#include <cstdlib>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/parallel.hpp"
#include "ggml.h"

extern "C" {
// Of ggml's internal headers.
void iq2xs_free_impl(enum ggml_type type);
void iq3xs_free_impl(int grid_size);
void ggml_critical_section_end(void);
}

namespace pgs {

namespace {

bool has_grid(std::int32_t type) {
    switch (type) {
        case GGML_TYPE_IQ2_XXS: case GGML_TYPE_IQ2_XS: case GGML_TYPE_IQ2_S: case GGML_TYPE_IQ1_S: case GGML_TYPE_IQ1_M:
        case GGML_TYPE_IQ3_XXS: case GGML_TYPE_IQ3_S:
            return true;
        default:
            return false;
    }
}

void free_grid(std::int32_t type) {
    switch (type) {
        case GGML_TYPE_IQ3_XXS: return iq3xs_free_impl(256);
        case GGML_TYPE_IQ3_S: return iq3xs_free_impl(512);
        default: return iq2xs_free_impl(static_cast<ggml_type>(type));
    }
}

// A point of the grid and its squared distance, as ggml sorts them.
struct Neighbour {
    int distance, point;
};

thread_local bool making = false;

// Points come in ascending order and distances are small, so counting them gives the order that ggml's comparison does.
void sort_neighbours(Neighbour* neighbours, std::size_t n) {
    thread_local std::vector<std::size_t> starts;
    thread_local std::vector<Neighbour> sorted;
    int largest = 0;
    for (std::size_t i = 0; i < n; ++i) largest = neighbours[i].distance > largest ? neighbours[i].distance : largest;
    starts.assign(static_cast<std::size_t>(largest) + 2, 0);
    sorted.resize(n);
    for (std::size_t i = 0; i < n; ++i) ++starts[static_cast<std::size_t>(neighbours[i].distance) + 1];
    for (std::size_t d = 1; d < starts.size(); ++d) starts[d] += starts[d - 1];
    for (std::size_t i = 0; i < n; ++i) sorted[starts[static_cast<std::size_t>(neighbours[i].distance)]++] = neighbours[i];
    for (std::size_t i = 0; i < n; ++i) neighbours[i] = sorted[i];
}

}  // namespace

// ggml is compiled with this name in place of qsort. Nearly all the time of making a grid (17 s for IQ1_M) is spent there,
// under a lock, so this is where a cancel is noticed.
extern "C" void pgs_qsort(void* base, std::size_t n, std::size_t size, int (*compare)(const void*, const void*)) {
    if (!making) return std::qsort(base, n, size, compare);
    if (const Cancel* cancel = Cancel::of_this_thread()) cancel->check();
    sort_neighbours(static_cast<Neighbour*>(base), n);
}

void make_grid(std::int32_t type) {
    if (!has_grid(type)) return;
    making = true;
    try {
        ggml_quantize_init(static_cast<ggml_type>(type));
    } catch (...) {  // a cancel or a failed allocation: ggml has its lock still, and a part of the grid
        making = false;
        free_grid(type);
        ggml_critical_section_end();
        throw;
    }
    making = false;
}

}  // namespace pgs
