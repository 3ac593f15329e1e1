// IQ3_XXS and IQ3_S: four numbers at a time as a point of a grid, a scale for each 32. Lanes are superblocks of 256; the
// points of a list are searched on their own.
#include "quant/lanes/grid_search.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

// IQ3_XXS or (S) IQ3_S: 98 or 110 bytes.
template <bool S>
LANE bool encode_group(const Group& group, bool weighted, const Grid& grid) {
    constexpr int tries = S ? 9 : 15;
    bool sure = true;
    const vf sigma2 = 2.0f * sum_of_squares(group) / 256.0f;
    vf scales[8], max_scale = {};
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
        Part<4, 32> p;
        load_values(group, 32 * j, 32, p.x);
        if (weighted)
            load_weights(group, 32 * j, 32, p.x, sigma2, p.w);
        else
            for (int i = 0; i < 32; ++i) p.w[i] = p.x[i] * p.x[i];
        vi signs = {};
        for (int k = 0; k < 4; ++k) signs |= p.take_signs(k, !S) << (S ? 8 : 7) * k;
        vf most = p.x[0];
        for (int i = 1; i < 32; ++i) most = larger(most, p.x[i]);
        const vm nothing = S ? equal(most, vf{}) : less(most, splat(1e-8f));
        const vm some = negate(nothing);
        // Inverses must be finite; ggml may decide about less.
        if (S) sure &= !any((vm)(some & less(most, splat(1e-30f))));
        p.prepare();
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
        Points<8> points = {most / 15.0f, {}, {}};
        for (int k = 0; k < 8; ++k) points.certain[k] = S ? (vm)(some & nothing) : (vm)(some | nothing);
        if (!search_points(p, grid, most, some, 15.0f, 0.2f, tries, points)) return false;
        vm all_certain = points.certain[0];
        for (int k = 1; k < 8; ++k) all_certain = (vm)(all_certain & points.certain[k]);
        const vm again = (vm)(some & negate(all_certain) & greater(points.scale, vf{}));
        if (!search_again(p, grid, again, S, points)) return false;
        const vm minus = less(points.scale, vf{});
        const vf scale = select(minus, -points.scale, points.scale);
        signs = select(minus, S ? ~signs : signs ^ 0x0fffffff, signs);
        vi index[8];
        for (int k = 0; k < 8; ++k) {
            index[k] = select(nothing, vi{}, gather(grid.map, points.chosen[k]));
            if (any(less(index[k], vi{}))) return false;
            if (S) (j < 4 ? high : high4) |= (index[k] >> 8) << (8 * (j % 4) + k);
        }
        for (int k = 0; k < 8; k += 4)
            store_words(word_of(index[k] & 255, index[k + 1] & 255, index[k + 2] & 255, index[k + 3] & 255), qs,
                        (S ? 0 : 8 * j) + k);
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
        if (S)
            packed |= l << 4 * j;
        else
            store_words(select(empty, vi{}, signs_of[j] | l << 28), group.target, 66 + 4 * j);
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
