// IQ2_XXS, IQ2_XS and IQ2_S: eight numbers at a time as a point of a grid, a scale for each 32 or 16. Lanes are superblocks
// of 256; the points of a list are searched on their own.
#include "quant/lanes/grid_search.hpp"
#include "quant/lanes/scale_min.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

enum Kind { xxs, xs, s };

template <Kind KIND>
LANE bool encode_group(const Group& group, bool weighted, const Grid& grid) {
    constexpr int N = KIND == xxs ? 32 : 16, groups = N / 8, parts = 256 / N, tries = KIND == xxs ? 6 : 9;
    constexpr int bytes = KIND == xxs ? 66 : KIND == xs ? 74 : 82;
    constexpr float nearly_nothing = KIND == s ? 1e-8f : group_max_eps;
    const vf sigma2 = (KIND == s ? 2.0f : 1.0f) * sum_of_squares(group) / 256.0f;
    vf scales[parts], max_scale = {};
    vi words[16] = {}, high[2] = {};  // of the indices and signs; IQ2_S: the upper two bits of the indices
    vi sign_words[16] = {};
    for (int j = 0; j < parts; ++j) {
        Part<8, N> p;
        load_values(group, N * j, N, p.x);
        if (weighted) load_weights(group, N * j, N, p.x, sigma2, p.w);
        else
            for (int i = 0; i < N; ++i) p.w[i] = 0.25f * sigma2 + p.x[i] * p.x[i];
        vi signs[groups];
        for (int k = 0; k < groups; ++k) signs[k] = p.take_signs(k, KIND != s);
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
        p.prepare();
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
                if (!p.points_at(grid, k, inverse, trial, some, codes[k], on_grid[k])) return false;
                p.add_sums(k, codes[k], sqx, sq2);
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
                if (!p.points_at(grid, k, inverse, final_scale, redo, codes, on_grid)) return false;
                chosen[k] = select(redo, codes, chosen[k]);
                p.add_sums(k, chosen[k], sqx, sq2);
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
            words[2 * j] = word_of(index);
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
