// IQ2_XXS, IQ2_XS and IQ2_S: eight numbers at a time as a point of a grid, a scale for each 32 or 16. Lanes are superblocks
// of 256; the points of a list are searched on their own.
#include "quant/lanes/neighbours.hpp"
#include "quant/lanes/scale_min.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

constexpr float grid_values[4] = {1, 3, 5, 0};

enum Kind { xxs, xs, s };

// N numbers of each lane's superblock.
template <int N>
struct Part {
    vf x[N], w[N], wx[N];           // magnitudes (one of eight may be negative), their weights, w * x
    float rows[W][N], roots[W][N];  // x and sqrt(w), lane by lane
};

// The point for each group of eight numbers at a scale: its packed codes, and whether they were on the grid as they are.
// False where ggml would not find one.
template <int N>
LANE bool points_at(const Part<N>& p, const Grid& grid, int k, vf inverse, const float* scale, vm wanted, vi& codes, vm& on_grid) {
    vi u = {};
    for (int i = 0; i < 8; ++i)
        u |= clamp(nearest_int(0.5f * (inverse * p.x[8 * k + i] - 1.0f)), 0, 2) << 2 * i;
    const vi index = gather(grid.map, u);
    on_grid = negate(less(index, vi{}));
    unsigned open = bits_of((vm)(negate(on_grid) & wanted));
    codes = u;
    if (!open) return true;
    int32_t found[W], starts[W];
    store(found, u);
    store(starts, -1 - index);
    for (; open; open &= open - 1) {
        const int lane = __builtin_ctz(open);
        const uint16_t* list = grid.list_codes + starts[lane];
        const int best = nearest_point<8>(list + 1, list[0], p.rows[lane] + 8 * k, p.roots[lane] + 8 * k, scale[lane], grid_values);
        if (best < 0) return false;
        found[lane] = list[1 + best];
    }
    codes = load_int(found);
    return true;
}

// Adds the sums of one group's eight numbers, q being 2 * code + 1.
template <int N>
LANE void add_sums(const Part<N>& p, int k, vi codes, vf& sqx, vf& sq2) {
    for (int i = 0; i < 8; ++i) {
        const vf q = to_float((codes >> 2 * i & 3) * 2 + 1);
        sqx += p.wx[8 * k + i] * q;
        sq2 += p.w[8 * k + i] * q * q;
    }
}

template <Kind KIND>
LANE bool encode_group(const Group& group, bool weighted, const Grid& grid) {
    constexpr int N = KIND == xxs ? 32 : 16, groups = N / 8, parts = 256 / N, tries = KIND == xxs ? 6 : 9;
    constexpr int bytes = KIND == xxs ? 66 : KIND == xs ? 74 : 82;
    constexpr float nearly_nothing = KIND == s ? 1e-8f : group_max_eps;
    vf sigma2 = {}, scales[parts], max_scale = {};
    for (int j = 0; j < 8; ++j) {
        const float* values[W];
        for (int lane = 0; lane < W; ++lane) values[lane] = group.values[lane] + 32 * j;
        vf x[32];
        load_columns(values, 32, x);
        for (int i = 0; i < 32; ++i) sigma2 += x[i] * x[i];
    }
    sigma2 = (KIND == s ? 2.0f * sigma2 : sigma2) / 256.0f;
    vi words[16] = {}, high[2] = {};  // of the indices and signs; IQ2_S: the upper two bits of the indices
    vi sign_words[16] = {};
    for (int j = 0; j < parts; ++j) {
        Part<N> p;
        const float *values[W], *importance[W];
        for (int lane = 0; lane < W; ++lane) {
            values[lane] = group.values[lane] + N * j;
            if (weighted) importance[lane] = group.importance[lane] + N * j;
        }
        load_columns(values, N, p.x);
        if (weighted) {
            load_columns(importance, N, p.w);
            for (int i = 0; i < N; ++i) p.w[i] = p.w[i] * square_root(sigma2 + p.x[i] * p.x[i]);
        } else {
            for (int i = 0; i < N; ++i) p.w[i] = 0.25f * sigma2 + p.x[i] * p.x[i];
        }
        vi signs[groups];
        for (int k = 0; k < groups; ++k) {
            // But for IQ2_S the number of minus signs must be even: that of the number that matters least changes.
            vf least = p.w[8 * k] * p.x[8 * k] * p.x[8 * k];
            vi where = {}, count = {}, bits = {};
            for (int i = 0; i < 8; ++i) {
                vf& x = p.x[8 * k + i];
                if (KIND != s) {
                    const vf matters = p.w[8 * k + i] * x * x;
                    const vm lower = less(matters, least);
                    least = select(lower, matters, least);
                    where = select(lower, splat(i), where);
                }
                const vm minus = less(x, vf{});
                x = select(minus, -x, x);
                bits |= select(minus, splat(1 << i), vi{});
                count ^= select(minus, splat(1), vi{});
            }
            if (KIND != s) {
                const vm odd = negate(equal(count, vi{}));
                for (int i = 0; i < 8; ++i) {
                    const vm flip = (vm)(odd & equal(where, splat(i)));
                    p.x[8 * k + i] = select(flip, -p.x[8 * k + i], p.x[8 * k + i]);
                    bits ^= select(flip, splat(1 << i), vi{});
                }
                bits &= 127;
            }
            signs[k] = bits;
        }
        vf most = p.x[0];
        for (int i = 1; i < N; ++i) most = larger(most, p.x[i]);
        vm nothing = less(most, splat(nearly_nothing));
        scales[j] = vf{};
        if (all(nothing)) continue;
        vf scale;
        if (KIND == xxs) {
            vi unused[N];
            scale = quantize_positive<N>(p.x, p.w, 4, unused);
            most = scale * 3.0f;
            nothing = (vm)(nothing | less_equal(most, vf{}));
        } else {
            scale = most / 5.0f;
        }
        const vm some = negate(nothing);
        for (int i = 0; i < N; i += W) {
            vf columns[W];
            for (int c = 0; c < W; ++c) columns[c] = p.x[i + c];
            transpose(columns);
            for (int lane = 0; lane < W; ++lane) store(p.rows[lane] + i, columns[lane]);
            for (int c = 0; c < W; ++c) columns[c] = square_root(p.w[i + c]);
            transpose(columns);
            for (int lane = 0; lane < W; ++lane) store(p.roots[lane] + i, columns[lane]);
        }
        for (int i = 0; i < N; ++i) p.wx[i] = p.w[i] * p.x[i];
        vf best = {};
        vi chosen[groups] = {};  // codes
        vm certain[groups];      // they were on the grid
        for (int k = 0; k < groups; ++k) certain[k] = (vm)(some | nothing);
        for (int step = -tries; step <= tries; ++step) {
            const vf inverse = (5.0f + (float)step * 0.1f) / most;
            float trial[W];
            store(trial, 1.0f / inverse);
            vi codes[groups];
            vm on_grid[groups];
            vf sqx = {}, sq2 = {};
            for (int k = 0; k < groups; ++k) {
                if (!points_at(p, grid, k, inverse, trial, some, codes[k], on_grid[k])) return false;
                add_sums(p, k, codes[k], sqx, sq2);
            }
            const vm better = (vm)(greater(sq2, vf{}) & greater(sqx * sqx, best * sq2));
            if (!any(better)) continue;
            const vf now = sqx / sq2;
            scale = select(better, now, scale);
            best = select(better, now * sqx, best);
            for (int k = 0; k < groups; ++k) {
                chosen[k] = select(better, codes[k], chosen[k]);
                certain[k] = (vm)((better & on_grid[k]) | (negate(better) & certain[k]));
            }
        }
        vm again = (vm)(some & greater(scale, vf{}));
        if (KIND != xxs) again = (vm)(again & negate((vm)(certain[0] & certain[1])));
        if (any(again)) {
            const vf inverse = 1.0f / scale;
            float final_scale[W];
            store(final_scale, scale);
            vf sqx = {}, sq2 = {};
            for (int k = 0; k < groups; ++k) {
                const vm redo = KIND == xxs ? again : (vm)(again & negate(certain[k]));
                vi codes;
                vm on_grid;
                if (!points_at(p, grid, k, inverse, final_scale, redo, codes, on_grid)) return false;
                chosen[k] = select(redo, codes, chosen[k]);
                add_sums(p, k, chosen[k], sqx, sq2);
            }
            scale = select((vm)(again & greater(sq2, vf{})), sqx / sq2, scale);
        }
        const vm minus = less(scale, vf{});
        scale = select(minus, -scale, scale);
        if (any((vm)(some & negate(greater_equal(scale, vf{}))))) return false;
        vi index[groups];
        for (int k = 0; k < groups; ++k) {
            signs[k] = select(nothing, vi{}, select(minus, signs[k] ^ (KIND == s ? 255 : 127), signs[k]));
            index[k] = select(nothing, vi{}, gather(grid.map, chosen[k]));
            if (any(less(index[k], vi{}))) return false;
        }
        if constexpr (KIND == xxs) {
            words[2 * j] = index[0] | index[1] << 8 | index[2] << 16 | index[3] << 24;
            words[2 * j + 1] = signs[0] | signs[1] << 7 | signs[2] << 14 | signs[3] << 21;
        } else if constexpr (KIND == xs) {
            words[j] = index[0] | signs[0] << 9 | (index[1] | signs[1] << 9) << 16;
        } else {
            words[j / 2] |= ((index[0] & 255) | (index[1] & 255) << 8) << 16 * (j % 2);
            sign_words[j / 2] |= (signs[0] | signs[1] << 8) << 16 * (j % 2);
            high[j / 8] |= (index[0] >> 8 | index[1] >> 8 << 2) << 4 * (j % 8);
        }
        scales[j] = select(nothing, vf{}, scale);
        max_scale = larger(max_scale, scales[j]);
    }
    const vm empty = equal(max_scale, vf{});
    const vf d = max_scale / 31.0f, inverse = 1.0f / d;
    store_halves(select(empty, vi{}, (vi)float_to_half(KIND == s ? d * 0.9875f : d)), group.target, 0);
    vi packed[2] = {};
    for (int j = 0; j < parts; ++j) {
        const vi l = select(empty, vi{}, clamp(nearest_int(0.5f * (inverse * scales[j] - 1.0f)), 0, 15));
        if (KIND == xxs) words[2 * j + 1] |= l << 28;
        else packed[j / 8] |= l << 4 * (j % 8);
    }
    for (int j = 0; j < 16; ++j) {
        if (KIND == s) store_words(j < 8 ? words[j] : sign_words[j - 8], group.target, 2 + 4 * j);
        else store_words(select(empty, vi{}, words[j]), group.target, 2 + 4 * j);
    }
    for (int j = 0; j < 2; ++j) {
        if (KIND == s) store_words(high[j], group.target, 66 + 4 * j);
        if (KIND != xxs) store_words(packed[j], group.target, bytes - 8 + 4 * j);
    }
    return true;
}

template <Kind KIND>
bool encode(const Rows& rows) {
    bool sure = true;
    for_groups(rows, 256, KIND == xxs ? 66 : KIND == xs ? 74 : 82, [&](const Group& group) {
        sure = sure && encode_group<KIND>(group, rows.importance != nullptr, *rows.grid);
    });
    return sure;
}

}  // namespace

bool encode_iq2_xxs(const Rows& rows) { return encode<xxs>(rows); }
bool encode_iq2_xs(const Rows& rows) { return encode<xs>(rows); }
bool encode_iq2_s(const Rows& rows) { return encode<s>(rows); }

}  // namespace pgs::lanes::PGS_SET
