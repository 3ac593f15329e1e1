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
        if (weighted)
            load_weights(group, N * j, N, p.x, sigma2, p.w);
        else
            for (int i = 0; i < N; ++i) p.w[i] = 0.25f * sigma2 + p.x[i] * p.x[i];
        vi signs[groups];
        for (int k = 0; k < groups; ++k) signs[k] = p.take_signs(k, KIND != s);
        vf most = p.x[0];
        for (int i = 1; i < N; ++i) most = larger(most, p.x[i]);
        vm nothing = less(most, splat(nearly_nothing));
        scales[j] = vf{};
        if (all(nothing)) continue;
        Points<groups> points = {};
        if (KIND == xxs) {
            vi unused[N];
            points.scale = quantize_positive<N>(p.x, p.w, 4, unused);
            most = points.scale * 3.0f;
            nothing = (vm)(nothing | less_equal(most, vf{}));
        } else {
            points.scale = most / 5.0f;
        }
        const vm some = negate(nothing);
        p.prepare();
        for (int k = 0; k < groups; ++k) points.certain[k] = (vm)(some | nothing);
        if (!search_points(p, grid, most, some, 5.0f, 0.1f, tries, points)) return false;
        vm again = (vm)(some & greater(points.scale, vf{}));
        if (KIND != xxs) again = (vm)(again & negate((vm)(points.certain[0] & points.certain[1])));
        if (!search_again(p, grid, again, KIND == xxs, points)) return false;
        const vm minus = less(points.scale, vf{});
        const vf scale = select(minus, -points.scale, points.scale);
        if (any((vm)(some & negate(greater_equal(scale, vf{}))))) return false;
        vi index[groups];
        for (int k = 0; k < groups; ++k) {
            signs[k] = select(nothing, vi{}, select(minus, signs[k] ^ (KIND == s ? 255 : 127), signs[k]));
            index[k] = select(nothing, vi{}, gather(grid.map, points.chosen[k]));
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
        if (KIND == xxs)
            words[2 * j + 1] |= l << 28;
        else
            packed[j / 8] |= l << 4 * (j % 8);
    }
    for (int j = 0; j < 16; ++j) {
        if (KIND == s)
            store_words(j < 8 ? words[j] : sign_words[j - 8], group.target, 2 + 4 * j);
        else
            store_words(select(empty, vi{}, words[j]), group.target, 2 + 4 * j);
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
    constexpr uint32_t bytes = KIND == xxs ? 66 : KIND == xs ? 74 : 82;
    for_groups(rows, 256, bytes, [&](const Group& group) {
        sure = sure && encode_group<KIND>(group, rows.importance != nullptr, *rows.grid);
    });
    return sure;
}

}  // namespace

bool encode_iq2_xxs(const Rows& rows) { return encode<xxs>(rows); }
bool encode_iq2_xs(const Rows& rows) { return encode<xs>(rows); }
bool encode_iq2_s(const Rows& rows) { return encode<s>(rows); }

}  // namespace pgs::lanes::PGS_SET
