// The nearest of a list of grid points, in the order in which ggml compares them, and what IQ2 and IQ3 share beside it.
#pragma once
#include "quant/grid.hpp"
#include "quant/lanes/blocks.hpp"

namespace pgs::lanes::PGS_SET {

// Which of n points has the least d2 = sum over its axes of w * (scale * q - x)^2, the first of several, or -1 if none is
// below FLT_MAX. q, and so each term, has few values on an axis: 8 of them on each of 4 axes, or 3 of 4 on each of 8. They are
// computed once; d2 of a point is then a sum of table entries, in ggml's order. Lanes are points. `codes` are those of
// Grid::list_codes; up to W more may be read.
#if PGS_WIDTH >= 8
template <int AXES>
LANE int nearest_point(const uint16_t* codes, int n, const float* x, const float* w, float scale, const float* values) {
    constexpr int bits = 16 / AXES;  // 4 or 2
#if PGS_WIDTH == 16
    // The terms of all axes in two vectors: 4 axes of 8 entries, or 8 of 4 (one unused), which are then spread.
    const vi lower = AXES == 4 ? vi{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1}
                               : vi{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const vi upper = lower + AXES / 2;
    vf q, xs, ws, table[AXES];
    if constexpr (AXES == 4) {
        q = _mm512_broadcast_f32x8(_mm256_loadu_ps(values));
        xs = _mm512_castps128_ps512(_mm_loadu_ps(x));
        ws = _mm512_castps128_ps512(_mm_loadu_ps(w));
    } else {
        q = _mm512_broadcast_f32x4(_mm_loadu_ps(values));
        xs = _mm512_castps256_ps512(_mm256_loadu_ps(x));
        ws = _mm512_castps256_ps512(_mm256_loadu_ps(w));
    }
    const vf sq = scale * q;
    const vf da = sq - (vf)_mm512_permutexvar_ps((__m512i)lower, xs),
             db = sq - (vf)_mm512_permutexvar_ps((__m512i)upper, xs);
    const vf a = (vf)_mm512_permutexvar_ps((__m512i)lower, ws) * da * da;
    const vf b = (vf)_mm512_permutexvar_ps((__m512i)upper, ws) * db * db;
    if constexpr (AXES == 4) {
        table[0] = table[1] = a;  // odd axes have bit 3 set in their codes
        table[2] = table[3] = b;
    } else {
        table[0] = _mm512_shuffle_f32x4(a, a, 0x00), table[1] = _mm512_shuffle_f32x4(a, a, 0x55);
        table[2] = _mm512_shuffle_f32x4(a, a, 0xaa), table[3] = _mm512_shuffle_f32x4(a, a, 0xff);
        table[4] = _mm512_shuffle_f32x4(b, b, 0x00), table[5] = _mm512_shuffle_f32x4(b, b, 0x55);
        table[6] = _mm512_shuffle_f32x4(b, b, 0xaa), table[7] = _mm512_shuffle_f32x4(b, b, 0xff);
    }
    auto look_up = [](vf t, vi at) __attribute__((always_inline)) {
        return AXES == 4 ? (vf)_mm512_permutexvar_ps((__m512i)at, t) : (vf)_mm512_permutevar_ps(t, (__m512i)at);
    };
    auto widen = [](const uint16_t* p) __attribute__((always_inline)) {
        return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u*)p));
    };
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
    const vf q = AXES == 4 ? load(values) : (vf)_mm256_broadcast_ps((const __m128*)values);
    const vf sq = scale * q;
    vf table[AXES];
    for (int i = 0; i < AXES; ++i) {
        const vf difference = sq - x[i];
        table[i] = w[i] * difference * difference;
    }
    auto look_up = [](vf t, vi at) __attribute__((always_inline)) {
        return AXES == 4 ? (vf)_mm256_permutevar8x32_ps(t, (__m256i)at) : (vf)_mm256_permutevar_ps(t, (__m256i)at);
    };
    auto widen = [](const uint16_t* p) __attribute__((always_inline)) {
        return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u*)p));
    };
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
#endif
    vf best = splat(__FLT_MAX__);
    vi where = splat(-1);
    for (int j = 0; j < n; j += W) {
        const vi code = widen(codes + j);
        vf d2 = look_up(table[0], code);
#pragma GCC unroll 7
        for (int i = 1; i < AXES; ++i) d2 += look_up(table[i], (vi)((vu)code >> bits * i));
        const vi index = lane + j;
        const vm better = (vm)(less(d2, best) & less(index, splat(n)));
        best = select(better, d2, best);
        where = select(better, index, where);
    }
#if PGS_WIDTH == 16
    const float least = _mm512_reduce_min_ps(best);
    const __mmask16 first = _mm512_cmp_ps_mask(best, _mm512_set1_ps(least), _CMP_EQ_OQ);
    if (n <= W && least < __FLT_MAX__) return __builtin_ctz(first);
    // As unsigned -1 is above all.
    return (int)_mm512_mask_reduce_min_epu32(first, (__m512i)where);
#else
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(best), _mm256_extractf128_ps(best, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    m = _mm_min_ss(m, _mm_shuffle_ps(m, m, 1));
    const vf least = _mm256_broadcastss_ps(m);
    const vi candidates = select(best == least, where, splat(-1));
    __m128i c =
        _mm_min_epu32(_mm256_castsi256_si128((__m256i)candidates), _mm256_extracti128_si256((__m256i)candidates, 1));
    c = _mm_min_epu32(c, _mm_unpackhi_epi64(c, c));
    c = _mm_min_epu32(c, _mm_shuffle_epi32(c, 1));
    return _mm_cvtsi128_si32(c);
#endif
}
#else
template <int AXES>
LANE int nearest_point(const uint16_t* codes, int n, const float* x, const float* w, float scale, const float* values) {
    constexpr int bits = 16 / AXES, count = AXES == 4 ? 8 : 4;
    float table[AXES][count];
    for (int i = 0; i < AXES; ++i)
        for (int v = 0; v < count; ++v) {
            const float difference = scale * values[v] - x[i];
            table[i][v] = w[i] * difference * difference;
        }
    float best = __FLT_MAX__;
    int where = -1;
    for (int j = 0; j < n; ++j) {
        const unsigned code = codes[j];
        float d2 = table[0][code & (count - 1)];
        for (int i = 1; i < AXES; ++i) d2 += table[i][code >> bits * i & (count - 1)];
        if (d2 < best) {
            best = d2;
            where = j;
        }
    }
    return where;
}
#endif

// Columns back into rows, lane by lane.
template <int N>
LANE void by_lane(const vf* columns, float (*rows)[N]) {
    for (int i = 0; i < N; i += W) {
        vf c[W];
        for (int k = 0; k < W; ++k) c[k] = columns[i + k];
        transpose(c);
        for (int lane = 0; lane < W; ++lane) store(rows[lane] + i, c[lane]);
    }
}

// --- IQ2 and IQ3: codes stand for 1, 3, 5, ... ---

// N numbers of each lane's superblock, for points of AXES axes.
template <int AXES, int N>
struct Part {
    vf x[N], w[N], wx[N];           // magnitudes (one of eight may be negative), their weights, w * x
    float rows[W][N], roots[W][N];  // x and sqrt(w), lane by lane
    static constexpr int bits = AXES == 4 ? 3 : 2, mask = (1 << bits) - 1, highest = AXES == 4 ? 7 : 2;

    LANE_MEMBER void prepare() {
        vf root[N];
        for (int i = 0; i < N; ++i) {
            root[i] = square_root(w[i]);
            wx[i] = w[i] * x[i];
        }
        by_lane<N>(x, rows);
        by_lane<N>(root, roots);
    }

    // The point for group k of numbers at a scale: its packed codes, and whether they were on the grid as they are. False
    // where ggml would not find one.
    LANE_MEMBER bool points_at(const Grid& grid, int k, vf inverse, const float* scale, vm wanted, vi& codes,
                               vm& on_grid) const {
        static constexpr float values[8] = {1, 3, 5, 7, 9, 11, 13, 15};
        codes = vi{};
        for (int i = 0; i < AXES; ++i)
            codes |= clamp(nearest_int(0.5f * (inverse * x[AXES * k + i] - 1.0f)), 0, highest) << bits * i;
        const vi index = gather(grid.map, codes);
        on_grid = negate(less(index, vi{}));
        unsigned open = bits_of((vm)(negate(on_grid) & wanted));
        if (!open) return true;
        int32_t found[W], starts[W];
        store(found, codes);
        store(starts, -1 - index);
        for (; open; open &= open - 1) {
            const int lane = __builtin_ctz(open);
            const uint16_t* list = grid.list_codes + starts[lane];
            const int best = nearest_point<AXES>(list + 1, list[0], rows[lane] + AXES * k, roots[lane] + AXES * k,
                                                 scale[lane], values);
            if (best < 0) return false;
            const int c = list[1 + best];
            found[lane] = AXES == 8 ? c : (c & 7) | (c >> 1 & 070) | (c >> 2 & 0700) | (c >> 3 & 07000);
        }
        codes = load_int(found);
        return true;
    }

    // Adds the sums of one group's numbers, q being 2 * code + 1.
    LANE_MEMBER void add_sums(int k, vi codes, vf& sqx, vf& sq2) const {
        for (int i = 0; i < AXES; ++i) {
            const vf q = to_float((codes >> bits * i & mask) * 2 + 1);
            sqx += wx[AXES * k + i] * q;
            sq2 += w[AXES * k + i] * q * q;
        }
    }

    // Makes the numbers 8 k to 8 k + 7 positive; returns their minus signs as bits. even: with an even number of them, which
    // the number that matters least sees to by being negative.
    LANE_MEMBER vi take_signs(int k, bool even) {
        vf* const v = x + 8 * k;
        const vf* const weights = w + 8 * k;
        vf least = weights[0] * v[0] * v[0];
        vi where = {}, odd_count = {}, signs = {};
        for (int i = 0; i < 8; ++i) {
            if (even) {
                const vf matters = weights[i] * v[i] * v[i];
                const vm lower = less(matters, least);
                least = select(lower, matters, least);
                where = select(lower, splat(i), where);
            }
            const vm minus = less(v[i], vf{});
            v[i] = select(minus, -v[i], v[i]);
            signs |= select(minus, splat(1 << i), vi{});
            odd_count ^= select(minus, splat(1), vi{});
        }
        if (!even) return signs;
        const vm odd = negate(equal(odd_count, vi{}));
        for (int i = 0; i < 8; ++i) {
            const vm flip = (vm)(odd & equal(where, splat(i)));
            v[i] = select(flip, -v[i], v[i]);
            signs ^= select(flip, splat(1 << i), vi{});
        }
        return signs & 127;
    }
};

// What the search for a part's points and scale has so far.
template <int G>
struct Points {
    vf scale;
    vi chosen[G];   // codes of each group of numbers
    vm certain[G];  // they were on the grid as they are
};

// Of 2 * tries + 1 scales around most / highest the one whose points, with their best scale, fit best, in the lanes `some`;
// p.scale and p.certain are what stays where none does. False where only ggml may decide.
template <int AXES, int N, int G = N / AXES>
LANE bool search_points(const Part<AXES, N>& part, const Grid& grid, vf most, vm some, float highest, float delta,
                        int tries, Points<G>& p) {
    vf best = {};
    for (int step = -tries; step <= tries; ++step) {
        const vf inverse = (highest + (float)step * delta) / most;
        float trial[W];
        store(trial, 1.0f / inverse);
        vi codes[G];
        vm on_grid[G];
        vf sqx = {}, sq2 = {};
        for (int k = 0; k < G; ++k) {
            if (!part.points_at(grid, k, inverse, trial, some, codes[k], on_grid[k])) return false;
            part.add_sums(k, codes[k], sqx, sq2);
        }
        const vm better = (vm)(greater(sq2, vf{}) & greater(sqx * sqx, best * sq2));
        if (!any(better)) continue;
        const vf now = sqx / sq2;
        p.scale = select(better, now, p.scale);
        best = select(better, now * sqx, best);
        for (int k = 0; k < G; ++k) {
            p.chosen[k] = select(better, codes[k], p.chosen[k]);
            p.certain[k] = (vm)((better & on_grid[k]) | (negate(better) & p.certain[k]));
        }
    }
    return true;
}

// Once more at the scale that was found, in the lanes `again`: the points of all groups, or of those that were not on the grid.
template <int AXES, int N, int G = N / AXES>
LANE bool search_again(const Part<AXES, N>& part, const Grid& grid, vm again, bool all_groups, Points<G>& p) {
    if (!any(again)) return true;
    const vf inverse = 1.0f / p.scale;
    float scale[W];
    store(scale, p.scale);
    vf sqx = {}, sq2 = {};
    for (int k = 0; k < G; ++k) {
        const vm redo = all_groups ? again : (vm)(again & negate(p.certain[k]));
        vi codes;
        vm on_grid;
        if (!part.points_at(grid, k, inverse, scale, redo, codes, on_grid)) return false;
        p.chosen[k] = select(redo, codes, p.chosen[k]);
        part.add_sums(k, p.chosen[k], sqx, sq2);
    }
    p.scale = select((vm)(again & greater(sq2, vf{})), sqx / sq2, p.scale);
    return true;
}

// The sum of squares of each lane's superblock.
LANE vf sum_of_squares(const Group& group) {
    vf sum = {};
    for (int at = 0; at < 256; at += 32) {
        vf x[32];
        load_values(group, at, 32, x);
        for (int i = 0; i < 32; ++i) sum += x[i] * x[i];
    }
    return sum;
}

}  // namespace pgs::lanes::PGS_SET
