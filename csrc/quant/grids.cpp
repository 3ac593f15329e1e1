#include "quant/grids.hpp"

#include <atomic>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <vector>

#include "base/error.hpp"
#include "base/parallel.hpp"
#include "ggml.h"

extern "C" {
// Of ggml's internal headers.
void iq2xs_free_impl(enum ggml_type type);
void iq3xs_free_impl(int grid_size);
void ggml_critical_section_end(void);
// Of ggml_grids.c.
void pgs_ggml_grid(enum ggml_type type, const void** points, int* n, const int** map, const std::uint16_t** neighbours);
}

namespace pgs {

bool has_grid(std::int32_t type) {
    switch (type) {
        case GGML_TYPE_IQ2_XXS:
        case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S:
        case GGML_TYPE_IQ1_S:
        case GGML_TYPE_IQ1_M:
        case GGML_TYPE_IQ3_XXS:
        case GGML_TYPE_IQ3_S: return true;
        default: return false;
    }
}

namespace {

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
    for (std::size_t i = 0; i < n; ++i)
        sorted[starts[static_cast<std::size_t>(neighbours[i].distance)]++] = neighbours[i];
    for (std::size_t i = 0; i < n; ++i) neighbours[i] = sorted[i];
}

}  // namespace

// ggml is compiled with this name in place of qsort. Nearly all the time of making a grid (17 s for IQ1_M) is spent there,
// under a lock, so this is where a cancel is noticed. Elsewhere ggml sorts up to 32 pairs of 8 bytes (IQ1), whose equals must
// keep their order as in glibc's merge sort; the C library of another system may not do so.
extern "C" void pgs_qsort(void* base, std::size_t n, std::size_t size, int (*compare)(const void*, const void*)) {
    if (!making) {
        auto* items = static_cast<unsigned char*>(base);
        std::vector<unsigned char> item(size);
        for (std::size_t i = 1; i < n; ++i) {
            std::memcpy(item.data(), items + i * size, size);
            std::size_t at = i;
            for (; at > 0 && compare(items + (at - 1) * size, item.data()) > 0; --at)
                std::memcpy(items + at * size, items + (at - 1) * size, size);
            std::memcpy(items + at * size, item.data(), size);
        }
        return;
    }
    if (const Cancel* cancel = Cancel::of_this_thread()) cancel->check();
    sort_neighbours(static_cast<Neighbour*>(base), n);
}

namespace {

void make_grid(std::int32_t type) {
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

// A Grid and what it points to.
struct OwnedGrid {
    Grid grid;
    std::vector<std::uint16_t> codes, list_codes;
};

const Grid* read_grid(std::int32_t type) {
    const void* points;
    const int* map;
    const std::uint16_t* lists;
    auto* owned = new OwnedGrid;  // never freed: as long as ggml's own
    Grid& grid = owned->grid;
    pgs_ggml_grid(static_cast<ggml_type>(type), &points, &grid.points, &map, &lists);
    const bool iq3 = type == GGML_TYPE_IQ3_XXS || type == GGML_TYPE_IQ3_S;
    grid.axes = iq3 ? 4 : 8;
    grid.bits = iq3 ? 3 : 2;
    const auto* values = static_cast<const std::int8_t*>(points);
    for (int i = 0; i < grid.points; ++i) {
        int packed = 0;
        for (int k = 0; k < grid.axes; ++k) packed |= (values[i * grid.axes + k] - 1) / 2 << grid.bits * k;
        owned->codes.push_back(static_cast<std::uint16_t>(packed));
    }
    // ggml's map covers the codes that occur: up to 43691 of 2 bits, none of which is 3, and 4095 of 3 bits.
    const std::size_t mapped = iq3 ? 4096 : 43692;
    for (std::size_t i = 0; i < mapped; ++i) {
        if (map[i] >= 0) continue;
        const std::size_t start = static_cast<std::size_t>(-1 - map[i]), n = lists[start];
        if (owned->list_codes.size() < start + 1 + n) owned->list_codes.resize(start + 1 + n);
        owned->list_codes[start] = static_cast<std::uint16_t>(n);
        for (std::size_t j = 1; j <= n; ++j) {
            const unsigned packed = owned->codes[lists[start + j]];
            unsigned code = packed;
            if (iq3)
                code =
                    (packed & 7) | (packed & 070) << 1 | 0x80 | (packed & 0700) << 2 | (packed & 07000) << 3 | 0x8000;
            owned->list_codes[start + j] = static_cast<std::uint16_t>(code);
        }
    }
    owned->list_codes.resize(owned->list_codes.size() + 64);
    grid.codes = owned->codes.data();
    grid.map = map;
    grid.lists = lists;
    grid.list_codes = owned->list_codes.data();
    return &grid;
}

}  // namespace

const Grid* grid_of(std::int32_t type) {
    static std::atomic<const Grid*> grids[GGML_TYPE_COUNT];
    static std::mutex mutex;
    if (!has_grid(type)) return nullptr;
    if (const Grid* grid = grids[type].load(std::memory_order_acquire)) return grid;
    make_grid(type);
    const std::scoped_lock lock(mutex);
    if (!grids[type].load(std::memory_order_relaxed)) grids[type].store(read_grid(type), std::memory_order_release);
    return grids[type].load(std::memory_order_relaxed);
}

}  // namespace pgs
