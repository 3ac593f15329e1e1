// Q3_K and Q6_K: sub-blocks of 16 with a signed scale. Lanes are superblocks of 256.
#include "quant/lanes/scale.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

constexpr int N = 16;  // of a sub-block
constexpr int K = 4;   // sub-blocks of each lane's superblock at once: their sums do not wait for each other

// Levels for the final scale d; where it is zero those of the search stay.
template <int LEVELS>
LANE void final_levels(const vf* x, vf d, const vi* searched, vi* L) {
    const vm zero = equal(d, vf{});
    for (int i = 0; i < N; ++i) L[i] = clamp(nearest_int(x[i] / d), -LEVELS, LEVELS - 1) + LEVELS;
    if (!any(zero)) return;
    for (int i = 0; i < N; ++i) L[i] = select(zero, searched[i], L[i]);
}

// --- Q3_K ---

// ggml's make_q3_quants: levels, and up to five rounds in which a level changes where that fits better. A round that
// changes nothing is followed by none that does, so lanes need not stop on their own.
LANE void refine(const vf (*x)[N], vf (*l)[N], vf* scale) {
    vf wx[K][N], w[K][N], slx[K], sl2[K];
    vm nothing[K];
    for (int k = 0; k < K; ++k) {
        const Extreme e = extreme<N>(x[k]);
        nothing[k] = less(e.magnitude, splat(group_max_eps));
        const vf iscale = -4.0f / select(nothing[k], splat(1.0f), e.value);
        slx[k] = sl2[k] = vf{};
        for (int i = 0; i < N; ++i) {
            l[k][i] = signed_level<4>(iscale * x[k][i]);
            w[k][i] = x[k][i] * x[k][i];
            wx[k][i] = w[k][i] * x[k][i];
            slx[k] += wx[k][i] * l[k][i];
            sl2[k] += w[k][i] * l[k][i] * l[k][i];
        }
    }
    for (int round = 0; round < 5; ++round) {
        bool changed = false;
        for (int i = 0; i < N; ++i) {
            vf lx[K], l2[K], now[K];
            vm moved[K];
            bool some = false;
            for (int k = 0; k < K; ++k) {
                lx[k] = slx[k] - wx[k][i] * l[k][i];
                l2[k] = sl2[k] - w[k][i] * l[k][i] * l[k][i];
                now[k] = to_float(clamp(nearest_int(x[k][i] * l2[k] / lx[k]), -4, 3));
                moved[k] = (vm)(greater(lx[k], vf{}) & negate(equal(now[k], l[k][i])));
                some |= any(moved[k]);
            }
            if (!some) continue;
            for (int k = 0; k < K; ++k) {
                lx[k] += wx[k][i] * now[k];
                l2[k] += w[k][i] * now[k] * now[k];
                const vm better =
                    (vm)(moved[k] & greater(l2[k], vf{}) & greater(lx[k] * lx[k] * sl2[k], slx[k] * slx[k] * l2[k]));
                l[k][i] = select(better, now[k], l[k][i]);
                slx[k] = select(better, lx[k], slx[k]);
                sl2[k] = select(better, l2[k], sl2[k]);
                changed |= any(better);
            }
        }
        if (!changed) break;
    }
    for (int k = 0; k < K; ++k) {
        scale[k] = select((vm)(greater(sl2[k], vf{}) & negate(nothing[k])), slx[k] / sl2[k], vf{});
        for (int i = 0; i < N; ++i) l[k][i] = select(nothing[k], splat(-4.0f), l[k][i]);
    }
}

// False, having written nothing, where only ggml may decide.
template <bool WEIGHTED>
LANE bool encode_q3_k_group(const Group& group) {
    vf x[256], scales[16];
    vi ls[16], searched[16][N];  // without importance: levels; with it they are found again from `found`
    Scale found[16];
    load_columns(group.values, 256, x);
    vf d;
    if (WEIGHTED) {
        vf sigma2 = {}, sw[1][N], swx[1][N];
        for (int i = 0; i < 256; ++i) sigma2 += x[i] * x[i];
        sigma2 = 2.0f * sigma2 / 256.0f;
        for (int j = 0; j < 16; j += K) {
            const vf(*xs)[N] = (const vf(*)[N])(x + j * N);
            vf w[K][N], wx[K][N];
            load_weights(group, j * N, K * N, xs[0], sigma2, w[0]);
            for (int k = 0; k < K; ++k) {
                vf sum = {};
                for (int i = 0; i < N; ++i) {
                    sum += w[k][i];
                    wx[k][i] = w[k][i] * xs[k][i];
                }
                sw[0][j + k] = sum;
            }
            search_scale<N, 4, K>(xs, w, wx, found + j);
        }
        vm finite = equal(vf{}, vf{});
        for (int j = 0; j < 16; ++j) {
            scales[j] = found[j].scale;
            swx[0][j] = sw[0][j] * scales[j];
            finite = (vm)(finite & less(absolute(scales[j]), splat(__builtin_inff())));
        }
        // The levels of what is not finite depend on the bits of a NaN, and signed_level() is not for those. It takes
        // numbers and importance whose products are too large for a float.
        if (!all(finite)) return false;
        Scale block;
        search_scale<N, 32, 1>((const vf(*)[N])scales, sw, swx, &block);
        for (int j = 0; j < 16; ++j) ls[j] = levels_of<32>(block, scales[j]);
        d = block.scale;
    } else {
        for (int j = 0; j < 16; j += K) {
            vf l[K][N];
            refine((const vf(*)[N])(x + j * N), l, scales + j);
            for (int k = 0; k < K; ++k)
                for (int i = 0; i < N; ++i) searched[j + k][i] = (vi)(l[k][i] + (magic + 4.0f)) - magic_bits;
        }
        const Extreme e = extreme<N>(scales);
        const vm none = equal(e.value, vf{});
        const vf iscale = -32.0f / e.value;
        for (int j = 0; j < 16; ++j) {
            const vi l = nearest_int(iscale * scales[j]) << 24 >> 24;
            ls[j] = select(none, vi{}, clamp(l, -32, 31) + 32);
        }
        d = select(none, vf{}, 1.0f / iscale);
    }
    vi byte[12] = {};
    for (int j = 0; j < 8; ++j) byte[j] = (ls[j] & 15) | (ls[j + 8] & 15) << 4;
    for (int j = 0; j < 16; ++j) byte[8 + j % 4] |= ls[j] >> 4 << 2 * (j / 4);
    for (int j = 0; j < 12; j += 4) store_words(word_of(byte + j), group.target, 96 + j);
    const vu half = float_to_half(d);
    store_halves((vi)half, group.target, 108);
    d = half_to_float(half);
    vi high[32] = {};
    for (int h = 0; h < 2; ++h) {
        vi low[32] = {};
        for (int j = 8 * h; j < 8 * h + 8; ++j) {
            vi L[N], before[N];
            const vf dj = d * to_float(ls[j] - 32);
            if (WEIGHTED && any(equal(dj, vf{})))
                for (int i = 0; i < N; ++i) before[i] = levels_of<4>(found[j], x[j * N + i]);
            final_levels<4>(x + j * N, dj, WEIGHTED ? before : searched[j], L);
            const int at = j % 2 * 16, row = j / 2;
            for (int i = 0; i < N; ++i) {
                low[at + i] |= (L[i] & 3) << 2 * (row - 4 * h);
                high[at + i] |= L[i] >> 2 << row;
            }
        }
        for (int i = 0; i < 32; i += 4) store_words(word_of(low + i), group.target, 32 + 32 * h + i);
    }
    for (int i = 0; i < 32; i += 4) store_words(word_of(high + i), group.target, i);
    return true;
}

// --- Q6_K ---

template <bool WEIGHTED>
LANE void encode_q6_k_group(const Group& group) {
    vf x[256], scales[16];
    vi ls[16];
    Scale found[16];
    load_columns(group.values, 256, x);
    for (int j = 0; j < 16; j += K) {
        const vf(*xs)[N] = (const vf(*)[N])(x + j * N);
        vf w[K][N], wx[K][N];
        if (WEIGHTED) load_importance(group, j * N, K * N, w[0]);
        for (int k = 0; k < K; ++k)
            for (int i = 0; i < N; ++i) {
                if (!WEIGHTED) w[k][i] = xs[k][i] * xs[k][i];
                wx[k][i] = w[k][i] * xs[k][i];
            }
        search_scale<N, 32, K>(xs, w, wx, found + j);
        for (int k = 0; k < K; ++k) scales[j + k] = found[j + k].scale;
    }
    const Extreme e = extreme<N>(scales);
    const vm empty = less(e.magnitude, splat(group_max_eps));  // all bytes are zero
    const vf iscale = -128.0f / e.value;
    const vi half = select(empty, vi{}, (vi)float_to_half(1.0f / iscale));
    const vf d = half_to_float((vu)half);
    store_halves(half, group.target, 208);
    for (int j = 0; j < 16; ++j)
        ls[j] = select(empty, vi{}, lesser(splat(127), nearest_int(iscale * scales[j])) << 24 >> 24);
    for (int j = 0; j < 16; j += 4)
        store_words(word_of(ls[j] & 255, ls[j + 1] & 255, ls[j + 2] & 255, ls[j + 3]), group.target, 192 + j);
    for (int h = 0; h < 2; ++h)
        for (int at = 0; at < 2; ++at) {  // 16 of the 32 columns of this half
            vi L[4][N];
            for (int row = 0; row < 4; ++row) {
                const int j = 8 * h + 2 * row + at;
                vi before[N];
                const vf dj = d * to_float(ls[j]);
                if (any(equal(dj, vf{})))
                    for (int i = 0; i < N; ++i) before[i] = levels_of<32>(found[j], x[j * N + i]);
                final_levels<32>(x + j * N, dj, before, L[row]);
            }
            for (int i = 0; i < N; i += 4) {
                vi first = {}, second = {}, high = {};
                for (int b = 0; b < 4; ++b) {
                    const vi a0 = L[0][i + b], a1 = L[1][i + b], a2 = L[2][i + b], a3 = L[3][i + b];
                    first |= ((a0 & 15) | (a2 & 15) << 4) << 8 * b;
                    second |= ((a1 & 15) | (a3 & 15) << 4) << 8 * b;
                    high |= (a0 >> 4 | a1 >> 4 << 2 | a2 >> 4 << 4 | a3 >> 4 << 6) << 8 * b;
                }
                const int to = 16 * at + i;
                store_words(select(empty, vi{}, first), group.target, 64 * h + to);
                store_words(select(empty, vi{}, second), group.target, 64 * h + 32 + to);
                store_words(select(empty, vi{}, high), group.target, 128 + 32 * h + to);
            }
        }
}

}  // namespace

bool encode_q3_k(const Rows& rows) {
    bool done = true;
    const auto weighted = [&](const Group& group) { done &= encode_q3_k_group<true>(group); };
    if (rows.importance)
        for_groups(rows, 256, 110, weighted);
    else
        for_groups(rows, 256, 110, [](const Group& group) { encode_q3_k_group<false>(group); });
    return done;
}

bool encode_q6_k(const Rows& rows) {
    if (rows.importance)
        for_groups(rows, 256, 210, [](const Group& group) { encode_q6_k_group<true>(group); });
    else
        for_groups(rows, 256, 210, [](const Group& group) { encode_q6_k_group<false>(group); });
    return true;
}

}  // namespace pgs::lanes::PGS_SET
