// IQ3_XXS and IQ3_S: four numbers at a time as a point of a grid, a scale for each 32. Lanes are superblocks of 256; the
// points of a list are searched on their own.
#include "quant/lanes/blocks.hpp"
#include "quant/lanes/neighbours.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

constexpr float grid_values[8] = {1, 3, 5, 7, 9, 11, 13, 15};

// 32 numbers of each lane's superblock.
struct Part {
    vf x[32], w[32], wx[32];        // magnitudes (one of eight may be negative), their weights, w * x
    float rows[W][32], roots[W][32];  // x and sqrt(w), lane by lane
};

// The point for each group of four numbers at a scale: its packed codes, and whether they were on the grid as they are.
// False where ggml would not find one.
LANE bool points_at(const Part& p, const Grid& grid, int k, vf inverse, const float* scale, vm wanted, vi& codes, vm& on_grid) {
    vi u = {};
    for (int i = 0; i < 4; ++i)
        u |= clamp(nearest_int(0.5f * (inverse * p.x[4 * k + i] - 1.0f)), 0, 7) << 3 * i;
    const vi index = gather(grid.map, u);
    on_grid = negate(less(index, vi{}));
    unsigned open = bits_of((vm)(negate(on_grid) & wanted));
    codes = u;
    if (!open) return true;
    int32_t found[W], starts[W];
    store(found, u);
    store(starts, -1 - index);
    for (; open; open &= open - 1) {
        const int lane = __builtin_ctz(open), start = starts[lane];
        const uint16_t* list = grid.list_codes + start;
        const int best = nearest_point<4>(list + 1, list[0], p.rows[lane] + 4 * k, p.roots[lane] + 4 * k, scale[lane], grid_values);
        if (best < 0) return false;
        const int c = list[1 + best];
        found[lane] = (c & 7) | (c >> 1 & 070) | (c >> 2 & 0700) | (c >> 3 & 07000);
    }
    codes = load_int(found);
    return true;
}

// Adds the sums of one group's four numbers, q being 2 * code + 1.
LANE void add_sums(const Part& p, int k, vi codes, vf& sqx, vf& sq2) {
    for (int i = 0; i < 4; ++i) {
        const vf q = to_float((codes >> 3 * i & 7) * 2 + 1);
        sqx += p.wx[4 * k + i] * q;
        sq2 += p.w[4 * k + i] * q * q;
    }
}

// IQ3_XXS or (S) IQ3_S: 98 or 110 bytes.
template <bool S>
LANE bool encode_group(const Group& group, bool weighted, const Grid& grid) {
    constexpr int tries = S ? 9 : 15;
    bool sure = true;
    vf sigma2 = {}, scales[8], max_scale = {};
    for (int j = 0; j < 8; ++j) {
        const float* values[W];
        for (int lane = 0; lane < W; ++lane) values[lane] = group.values[lane] + 32 * j;
        vf x[32];
        load_columns(values, 32, x);
        for (int i = 0; i < 32; ++i) sigma2 += x[i] * x[i];
    }
    sigma2 = 2.0f * sigma2 / 256.0f;
    vi high = {}, high4 = {};  // IQ3_S: the ninth bits of the indices, eight for each part
    vi signs_of[8];
    // IQ3_S: where ggml writes next. It does not advance over a part of zeros, so that later parts come too early.
    unsigned char *qs[W], *sign_bytes[W];
    for (int lane = 0; lane < W; ++lane) {
        qs[lane] = group.target[lane] + 2;
        sign_bytes[lane] = group.target[lane] + 74;
        if (S) __builtin_memset(group.target[lane], 0, 110);
    }
    for (int j = 0; j < 8; ++j) {
        Part p;
        const float *values[W], *importance[W];
        for (int lane = 0; lane < W; ++lane) {
            values[lane] = group.values[lane] + 32 * j;
            if (weighted) importance[lane] = group.importance[lane] + 32 * j;
        }
        load_columns(values, 32, p.x);
        if (weighted) {
            load_columns(importance, 32, p.w);
            for (int i = 0; i < 32; ++i) p.w[i] = p.w[i] * square_root(sigma2 + p.x[i] * p.x[i]);
        } else {
            for (int i = 0; i < 32; ++i) p.w[i] = p.x[i] * p.x[i];
        }
        vi signs = {};
        for (int k = 0; k < 4; ++k) {
            vi s = {};
            if (S) {
                for (int i = 8 * k; i < 8 * k + 8; ++i) {
                    const vm minus = less(p.x[i], vf{});
                    p.x[i] = select(minus, -p.x[i], p.x[i]);
                    s |= select(minus, splat(1 << i % 8), vi{});
                }
                signs |= s << 8 * k;
                continue;
            }
            // The number of minus signs must be even: that of the number that matters least changes.
            vf least = p.w[8 * k] * p.x[8 * k] * p.x[8 * k];
            vi where = {}, count = {};
            for (int i = 0; i < 8; ++i) {
                vf& x = p.x[8 * k + i];
                const vf matters = p.w[8 * k + i] * x * x;
                const vm lower = less(matters, least);
                least = select(lower, matters, least);
                where = select(lower, splat(i), where);
                const vm minus = less(x, vf{});
                x = select(minus, -x, x);
                s |= select(minus, splat(1 << i), vi{});
                count ^= select(minus, splat(1), vi{});
            }
            const vm odd = negate(equal(count, vi{}));
            for (int i = 0; i < 8; ++i) {
                const vm flip = (vm)(odd & equal(where, splat(i)));
                p.x[8 * k + i] = select(flip, -p.x[8 * k + i], p.x[8 * k + i]);
                s ^= select(flip, splat(1 << i), vi{});
            }
            signs |= (s & 127) << 7 * k;
        }
        vf most = p.x[0];
        for (int i = 1; i < 32; ++i) most = larger(most, p.x[i]);
        const vm nothing = S ? equal(most, vf{}) : less(most, splat(1e-8f));
        const vm some = negate(nothing);
        // Inverses must be finite; ggml may decide about less.
        if (S) sure &= !any((vm)(some & less(most, splat(1e-30f))));
        for (int i = 0; i < 32; i += W) {
            vf columns[W];
            for (int c = 0; c < W; ++c) columns[c] = p.x[i + c];
            transpose(columns);
            for (int lane = 0; lane < W; ++lane) store(p.rows[lane] + i, columns[lane]);
            for (int c = 0; c < W; ++c) columns[c] = square_root(p.w[i + c]);
            transpose(columns);
            for (int lane = 0; lane < W; ++lane) store(p.roots[lane] + i, columns[lane]);
        }
        for (int i = 0; i < 32; ++i) p.wx[i] = p.w[i] * p.x[i];
        if (!sure) return false;
        if (!any(some)) {
            scales[j] = vf{};
            signs_of[j] = vi{};
            if (!S) {
                store_words(vi{}, qs, 8 * j);
                store_words(vi{}, qs, 8 * j + 4);
            }
            continue;
        }
        vf best = {}, scale = most / 15.0f;
        vi chosen[8] = {};  // codes
        vm certain[8];      // they were on the grid
        for (int k = 0; k < 8; ++k) certain[k] = S ? (vm)(some & nothing) : (vm)(some | nothing);
        for (int step = -tries; step <= tries; ++step) {
            const vf inverse = (15.0f + (float)step * 0.2f) / most;
            float trial[W];
            store(trial, 1.0f / inverse);
            vi codes[8];
            vm on_grid[8];
            vf sqx = {}, sq2 = {};
            for (int k = 0; k < 8; ++k) {
                if (!points_at(p, grid, k, inverse, trial, some, codes[k], on_grid[k])) return false;
                add_sums(p, k, codes[k], sqx, sq2);
            }
            const vm better = (vm)(greater(sq2, vf{}) & greater(sqx * sqx, best * sq2));
            if (!any(better)) continue;
            const vf now = sqx / sq2;
            scale = select(better, now, scale);
            best = select(better, now * sqx, best);
            for (int k = 0; k < 8; ++k) {
                chosen[k] = select(better, codes[k], chosen[k]);
                certain[k] = (vm)((better & on_grid[k]) | (negate(better) & certain[k]));
            }
        }
        vm all_certain = certain[0];
        for (int k = 1; k < 8; ++k) all_certain = (vm)(all_certain & certain[k]);
        const vm again = (vm)(some & negate(all_certain) & greater(scale, vf{}));
        if (any(again)) {
            const vf inverse = 1.0f / scale;
            float final_scale[W];
            store(final_scale, scale);
            vf sqx = {}, sq2 = {};
            for (int k = 0; k < 8; ++k) {
                const vm redo = S ? again : (vm)(again & negate(certain[k]));
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
        signs = select(minus, S ? ~signs : signs ^ 0x0fffffff, signs);
        vi index[8];
        for (int k = 0; k < 8; ++k) {
            index[k] = select(nothing, vi{}, gather(grid.map, chosen[k]));
            if (any(less(index[k], vi{}))) return false;
            if (S) (j < 4 ? high : high4) |= (index[k] >> 8) << (8 * (j % 4) + k);
        }
        for (int k = 0; k < 8; k += 4)
            store_words((index[k] & 255) | (index[k + 1] & 255) << 8 | (index[k + 2] & 255) << 16 | (index[k + 3] & 255) << 24,
                        qs, (S ? 0 : 8 * j) + k);
        signs_of[j] = select(nothing, vi{}, signs);
        if (S) {
            store_words(signs_of[j], sign_bytes, 0);
            const unsigned written = bits_of(some);
            for (int lane = 0; lane < W; ++lane)
                if (written >> lane & 1) qs[lane] += 8, sign_bytes[lane] += 4;
        }
        if (any((vm)(some & negate(greater_equal(scale, vf{}))))) return false;
        scales[j] = select(nothing, vf{}, scale);
        max_scale = larger(max_scale, scales[j]);
    }
    const vm empty = equal(max_scale, vf{});
    const vf d = max_scale / 31.0f, inverse = 1.0f / d;
    vi packed = {};
    const vi half = select(empty, vi{}, (vi)float_to_half(d * (S ? 1.033f : 1.0125f)));
    store_halves(half, group.target, 0);
    for (int j = 0; j < 8; ++j) {
        const vi l = select(empty, vi{}, clamp(nearest_int(0.5f * (inverse * scales[j] - 1.0f)), 0, 15));
        if (S) packed |= l << 4 * j;
        else store_words(select(empty, vi{}, signs_of[j] | l << 28), group.target, 66 + 4 * j);
    }
    if (S) {
        store_words(high, group.target, 66);
        store_words(high4, group.target, 70);
        store_words(packed, group.target, 106);
    } else if (any(empty)) {
        const unsigned lanes = bits_of(empty);
        for (int lane = 0; lane < W; ++lane)
            if (lanes >> lane & 1) __builtin_memset(group.target[lane], 0, 98);
    }
    return true;
}

}  // namespace

bool encode_iq3_xxs(const Rows& rows) {
    bool sure = true;
    for_groups(rows, 256, 98, [&](const Group& group) {
        sure = sure && encode_group<false>(group, rows.importance != nullptr, *rows.grid);
    });
    return sure;
}

bool encode_iq3_s(const Rows& rows) {
    bool sure = true;
    for_groups(rows, 256, 110, [&](const Group& group) {
        sure = sure && encode_group<true>(group, rows.importance != nullptr, *rows.grid);
    });
    return sure;
}

}  // namespace pgs::lanes::PGS_SET
