// IQ1_S and IQ1_M: eight numbers at a time as a point of a grid of three values, a scale for each 32 or 16. Lanes are
// superblocks of 256; the points of a list are searched on their own.
#include "quant/lanes/grid_search.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

// The three values, shifted up or down by IQ1S_DELTA = IQ1M_DELTA.
constexpr float delta = 0.125f;
constexpr float up[4] = {-1 + delta, delta, 1 + delta, 0}, down[4] = {-1 - delta, -delta, 1 - delta, 0};

// Sorts n numbers of each lane, and their places; equals keep their order, as in glibc's qsort, which is a stable merge
// sort. Batcher's odd-even merge network, made stable by the places.
template <int n>
LANE void sort(vf* v, vi* place) {
    for (int p = 1; p < n; p *= 2)
        for (int k = p; k >= 1; k /= 2)
            for (int j = k % p; j + k < n; j += 2 * k)
                for (int i = j; i < j + k && i + k < n; ++i) {
                    if (i / (2 * p) != (i + k) / (2 * p)) continue;
                    const vf a = v[i], b = v[i + k];
                    const vi pa = place[i], pb = place[i + k];
                    const vm swap = (vm)(less(b, a) | (equal(a, b) & less(pb, pa)));
                    v[i] = select(swap, b, a);
                    v[i + k] = select(swap, a, b);
                    place[i] = select(swap, pb, pa);
                    place[i + k] = select(swap, pa, pb);
                }
}

// One of three values by its code.
LANE vf pick(vi code, vf first, vf second, vf third) {
    return select(equal(code, vi{}), first, select(equal(code, splat(1)), second, third));
}

// The two ends that split sorted numbers into those of the first, second and third value, with the best fit so far.
struct Split {
    vf score = splat(-__FLT_MAX__), scale;
    vi first = splat(-1), second = splat(-1), shift = {};
    LANE_MEMBER void offer(vf qx, vf q2, int i1, int i2, int kind) {
        const vm better = (vm)(greater(q2, vf{}) & greater(qx * qx, score * q2));
        if (!any(better)) return;
        const vf s = qx / q2;
        scale = select(better, s, scale);
        score = select(better, s * qx, score);
        first = select(better, splat(i1), first);
        second = select(better, splat(i2), second);
        shift = select(better, splat(kind), shift);
    }
};

// Codes (two bits each, 16 in a word) of numbers whose sorted places are given.
template <int n>
LANE void codes_of(const Split& split, const vi* place, vi* words) {
    for (int k = 0; k < n / 16; ++k) words[k] = vi{};
    for (int j = 0; j < n; ++j) {
        const vi at = splat(j);
        const vi level = select(less(at, split.first), vi{}, select(less(at, split.second), splat(1), splat(2)));
        const vi bits = (vi)((vu)level << (vu)((place[j] & 15) * 2));
        if (n == 16)
            words[0] |= bits;
        else
            for (int k = 0; k < n / 16; ++k) words[k] |= select(equal(place[j] >> 4, splat(k)), bits, vi{});
    }
}

// Codes of eight numbers onto the grid: those of the nearest point in lanes of `wanted` that are off it. False where ggml
// would not find one.
template <int N>
LANE bool onto_grid(const Grid& grid, const Group& group, int at, const float (*weights)[N], int k, vf scale, vm is_up,
                    vm wanted, vi& codes, vm& on_grid) {
    const vi index = gather(grid.map, codes);
    on_grid = negate(less(index, vi{}));
    unsigned open = bits_of((vm)(negate(on_grid) & wanted));
    if (!open) return true;
    const unsigned ups = bits_of(is_up);
    int32_t found[W], starts[W];
    float scales[W];
    store(found, codes);
    store(starts, -1 - index);
    store(scales, scale);
    for (; open; open &= open - 1) {
        const int lane = __builtin_ctz(open);
        const uint16_t* list = grid.list_codes + starts[lane];
        const int best = nearest_point<8>(list + 1, list[0], group.values[lane] + at + 8 * k, weights[lane] + 8 * k,
                                          scales[lane], ups >> lane & 1 ? up : down);
        if (best < 0) return false;
        found[lane] = list[1 + best];
    }
    codes = load_int(found);
    return true;
}

LANE vf sum_of_squares(const vf* x) {
    vf sum = {};
    for (int i = 0; i < 256; ++i) sum += x[i] * x[i];
    return 2.0f * sum / 256.0f;
}

// The weights in sorted order.
template <int n>
LANE void sorted_weights(const vf* w, const vi* place, vf* sorted) {
    vi lane;
    for (int j = 0; j < W; ++j) lane[j] = j;
    for (int j = 0; j < n; ++j) sorted[j] = gather((const float*)w, place[j] * W + lane);
}

// --- IQ1_S ---

LANE bool encode_s(const Group& group, const Grid& grid) {
    constexpr int N = 32;
    vf x[256], scales[8], max_scale = {};
    load_columns(group.values, 256, x);
    const vf sigma2 = sum_of_squares(x);
    vi high[8];
    vm ups[8];
    for (int j = 0; j < 8; ++j) {
        const vf* xs = x + 32 * j;
        scales[j] = vf{};
        high[j] = vi{};
        const vm some = negate(less(largest_of(xs, N), splat(1e-12f)));
        ups[j] = (vm)(some | negate(some));
        if (!any(some)) {
            store_words(vi{}, group.target, 2 + 4 * j);
            continue;
        }
        vf w[N], v[N], sw[N];
        float rows[W][N];
        vi place[N];
        load_weights(group, 32 * j, N, xs, sigma2, w);
        by_lane(w, rows);
        for (int i = 0; i < N; ++i) v[i] = xs[i], place[i] = splat(i);
        sort<N>(v, place);
        sorted_weights<N>(w, place, sw);
        vf px[N + 1], pw[N + 1];  // sums of the first numbers
        px[0] = pw[0] = vf{};
        for (int i = 0; i < N; ++i) {
            px[i + 1] = px[i] + sw[i] * v[i];
            pw[i + 1] = pw[i] + sw[i];
        }
        vf ux[N + 1], uw[N + 1], dx[N + 1], dw[N + 1];  // the part of the third value, shifted up and down
        for (int i = 0; i <= N; ++i) {
            ux[i] = (px[N] - px[i]) * up[2];
            uw[i] = (pw[N] - pw[i]) * up[2] * up[2];
            dx[i] = (px[N] - px[i]) * down[2];
            dw[i] = (pw[N] - pw[i]) * down[2] * down[2];
        }
        Split split;
        for (int i1 = 0; i1 <= N; ++i1) {
            const vf fux = (px[i1] - px[0]) * up[0], fuw = (pw[i1] - pw[0]) * up[0] * up[0];
            const vf fdx = (px[i1] - px[0]) * down[0], fdw = (pw[i1] - pw[0]) * down[0] * down[0];
            for (int i2 = i1; i2 <= N; ++i2) {
                // The second value is delta or -delta: one product but for its sign.
                const vf mx = (px[i2] - px[i1]) * delta, mw = (pw[i2] - pw[i1]) * delta * delta;
                split.offer(fux + mx + ux[i2], fuw + mw + uw[i2], i1, i2, 1);
                split.offer(fdx - mx + dx[i2], fdw + mw + dw[i2], i1, i2, -1);
            }
        }
        const vm good = (vm)(some & negate(equal(split.shift, vi{})));
        vi words[2];
        codes_of<N>(split, place, words);
        const vm minus = less(split.scale, vf{});
        vf scale = select(minus, -split.scale, split.scale);
        for (int k = 0; k < 2; ++k) words[k] = select(minus, (vi)(0xAAAAAAAAu - (vu)words[k]), words[k]);
        const vi shift = select(minus, -split.shift, split.shift);
        const vm is_up = equal(shift, splat(1));
        const vf v0 = select(is_up, splat(up[0]), splat(down[0])), v1 = select(is_up, splat(up[1]), splat(down[1])),
                 v2 = select(is_up, splat(up[2]), splat(down[2]));
        vm all_on = (vm)(good | negate(good));
        vf sqx = {}, sq2 = {};
        vi low = {};
        for (int k = 0; k < 4; ++k) {
            vi codes = (vi)((vu)words[k / 2] >> 16 * (k % 2) & 0xffff);
            vm on_grid;
            codes = select(good, codes, vi{});
            if (!onto_grid<N>(grid, group, 32 * j, rows, k, scale, is_up, good, codes, on_grid)) return false;
            all_on = (vm)(all_on & on_grid);
            for (int i = 0; i < 8; ++i) {
                const vf wq = w[8 * k + i] * pick(codes >> 2 * i & 3, v0, v1, v2);
                sqx += wq * xs[8 * k + i];
                sq2 += wq * pick(codes >> 2 * i & 3, v0, v1, v2);
            }
            const vi index = select(good, gather(grid.map, codes), vi{});
            low |= (index & 255) << 8 * k;
            high[j] |= index >> 8 << 3 * k;
        }
        scale = select((vm)(negate(all_on) & greater(sqx, vf{}) & greater(sq2, vf{})), sqx / sq2, scale);
        if (any((vm)(good & negate(greater_equal(scale, vf{}))))) return false;
        store_words(low, group.target, 2 + 4 * j);
        scales[j] = select(good, scale, vf{});
        ups[j] = (vm)(is_up | negate(good));
        max_scale = larger(max_scale, scales[j]);
    }
    const vm empty = equal(max_scale, vf{});
    const vf d = max_scale / 15.0f, inverse = 1.0f / d;
    store_halves(select(empty, vi{}, (vi)float_to_half(d * 1.125f)), group.target, 0);
    for (int j = 0; j < 8; ++j) {
        const vi l = clamp(nearest_int(0.5f * (inverse * scales[j] - 1.0f)), 0, 7) | select(ups[j], vi{}, splat(8));
        store_halves(select(empty, high[j], high[j] | l << 12), group.target, 34 + 2 * j);
    }
    return true;
}

// --- IQ1_M ---

LANE bool encode_m(const Group& group, bool weighted, const Grid& grid) {
    constexpr int N = 16;
    vf x[256], w[256], scales[16], max_scale = {};
    load_columns(group.values, 256, x);
    const vf sigma2 = sum_of_squares(x);
    vi shifts[16], codes[16][2], index[16][2];
    for (int j = 0; j < 16; ++j) {
        const vf* xs = x + 16 * j;
        vf* const ws = w + 16 * j;
        if (weighted)
            load_weights(group, 16 * j, N, xs, sigma2, ws);
        else
            for (int i = 0; i < N; ++i) ws[i] = xs[i] * xs[i];
        scales[j] = vf{};
        shifts[j] = vi{};
        for (int k = 0; k < 2; ++k) codes[j][k] = splat((int32_t)grid.codes[0]), index[j][k] = vi{};
        const vm some = negate(less(largest_of(xs, N), splat(1e-7f)));
        if (!any(some)) continue;
        vf v[N], sw[N];
        float rows[W][N];
        vi place[N];
        by_lane(ws, rows);
        for (int i = 0; i < N; ++i) v[i] = xs[i], place[i] = splat(i);
        sort<N>(v, place);
        sorted_weights<N>(ws, place, sw);
        // Sums of the first numbers, for each half of the part, which have values of their own.
        vf px[2][N + 1], pw[2][N + 1], u2[2][N + 1], d2[2][N + 1];
        px[0][0] = px[1][0] = pw[0][0] = pw[1][0] = vf{};
        for (int i = 0; i < N; ++i) {
            const vm second = negate(less(place[i], splat(N / 2)));
            for (int h = 0; h < 2; ++h) {
                const vm mine = h ? second : negate(second);
                px[h][i + 1] = select(mine, px[h][i] + sw[i] * v[i], px[h][i]);
                pw[h][i + 1] = select(mine, pw[h][i] + sw[i], pw[h][i]);
            }
        }
        constexpr float cu1 = up[0] * up[0] - up[1] * up[1], cu2 = up[1] * up[1] - up[2] * up[2];
        constexpr float cd1 = down[0] * down[0] - down[1] * down[1], cd2 = down[1] * down[1] - down[2] * down[2];
        vf ux[2], dx[2], uw[2], dw[2];
        for (int h = 0; h < 2; ++h) {
            ux[h] = px[h][N] * up[2];
            dx[h] = px[h][N] * down[2];
            uw[h] = pw[h][N] * up[2] * up[2];
            dw[h] = pw[h][N] * down[2] * down[2];
            for (int i = 0; i <= N; ++i) {
                u2[h][i] = pw[h][i] * cu2;
                d2[h][i] = pw[h][i] * cd2;
            }
        }
        Split split;
        split.shift = splat(-1);
        for (int i1 = 0; i1 <= N; ++i1) {
            vf fu[2], fd[2];
            for (int h = 0; h < 2; ++h) {
                fu[h] = uw[h] + pw[h][i1] * cu1;
                fd[h] = dw[h] + pw[h][i1] * cd1;
            }
            for (int i2 = i1; i2 <= N; ++i2) {
                vf qu[2], qd[2], q2u[2], q2d[2];
                for (int h = 0; h < 2; ++h) {
                    const vf sx = px[h][i1] + px[h][i2];
                    qu[h] = ux[h] - sx;
                    qd[h] = dx[h] - sx;
                    q2u[h] = fu[h] + u2[h][i2];
                    q2d[h] = fd[h] + d2[h][i2];
                }
                split.offer(qu[0] + qu[1], q2u[0] + q2u[1], i1, i2, 0);
                split.offer(qu[0] + qd[1], q2u[0] + q2d[1], i1, i2, 1);
                split.offer(qd[0] + qu[1], q2d[0] + q2u[1], i1, i2, 2);
                split.offer(qd[0] + qd[1], q2d[0] + q2d[1], i1, i2, 3);
            }
        }
        const vm good = (vm)(some & negate(less(split.shift, vi{})));
        vi word;
        codes_of<N>(split, place, &word);
        const vm minus = less(split.scale, vf{});
        vf scale = select(minus, -split.scale, split.scale);
        word = select(minus, (vi)(0xAAAAAAAAu - (vu)word), word);
        const vi shift = select(minus, 3 - split.shift, split.shift);
        vm all_on = (vm)(good | negate(good));
        vf sqx = {}, sq2 = {};
        for (int k = 0; k < 2; ++k) {
            const vm is_up = equal(k ? shift & 1 : shift >> 1, vi{});
            const vf v0 = select(is_up, splat(up[0]), splat(down[0])), v1 = select(is_up, splat(up[1]), splat(down[1])),
                     v2 = select(is_up, splat(up[2]), splat(down[2]));
            vi c = select(good, (vi)((vu)word >> 16 * k & 0xffff), vi{});
            vm on_grid;
            if (!onto_grid<N>(grid, group, 16 * j, rows, k, scale, is_up, good, c, on_grid)) return false;
            all_on = (vm)(all_on & on_grid);
            for (int i = 0; i < 8; ++i) {
                const vf q = pick(c >> 2 * i & 3, v0, v1, v2), wq = ws[8 * k + i] * q;
                sqx += wq * xs[8 * k + i];
                sq2 += wq * q;
            }
            codes[j][k] = select(good, c, codes[j][k]);
            index[j][k] = select(good, gather(grid.map, c), vi{});
        }
        scale = select((vm)(negate(all_on) & greater(sqx, vf{}) & greater(sq2, vf{})), sqx / sq2, scale);
        if (any((vm)(good & negate(greater_equal(scale, vf{}))))) return false;
        scales[j] = select(good, scale, vf{});
        shifts[j] = select(good, shift, vi{});
        max_scale = larger(max_scale, scales[j]);
    }
    const vm empty = equal(max_scale, vf{});
    vf d = max_scale / 15.0f;
    const vf inverse = 1.0f / d;
    vi packed[4] = {};
    vf sqx = {}, sq2 = {};
    for (int j = 0; j < 16; ++j) {
        const vi l = clamp(nearest_int(0.5f * (inverse * scales[j] - 1.0f)), 0, 7);
        packed[j / 4] |= l << 3 * (j % 4);
        const vf factor = to_float(2 * l + 1);
        for (int k = 0; k < 2; ++k) {
            const vm is_up = equal(k ? shifts[j] & 1 : shifts[j] >> 1, vi{});
            const vf v0 = select(is_up, splat(up[0]), splat(down[0])), v1 = select(is_up, splat(up[1]), splat(down[1])),
                     v2 = select(is_up, splat(up[2]), splat(down[2]));
            for (int i = 0; i < 8; ++i) {
                const vf q = pick(codes[j][k] >> 2 * i & 3, v0, v1, v2) * factor, wq = w[16 * j + 8 * k + i] * q;
                sqx += wq * x[16 * j + 8 * k + i];
                sq2 += wq * q;
            }
        }
        const vi masks = (shifts[j] >> 1) * 8 + (shifts[j] & 1) * 128;
        const vi high = index[j][0] >> 8 | index[j][1] >> 8 << 4;
        store_bytes(select(empty, high, high | masks), group.target, 32 + j);
        store_halves((index[j][0] & 255) | (index[j][1] & 255) << 8, group.target, 2 * j);
    }
    d = select(greater(sq2, vf{}), sqx / sq2, d);
    const vi half = (vi)float_to_half(d * 1.1125f);
    for (int k = 0; k < 4; ++k)
        store_halves(select(empty, vi{}, packed[k] | (half >> 4 * k & 15) << 12), group.target, 48 + 2 * k);
    return true;
}

}  // namespace

bool encode_iq1_s(const Rows& rows) {
    bool sure = true;
    for_groups(rows, 256, 50, [&](const Group& group) { sure = sure && encode_s(group, *rows.grid); });
    return sure;
}

bool encode_iq1_m(const Rows& rows) {
    bool sure = true;
    for_groups(rows, 256, 56,
               [&](const Group& group) { sure = sure && encode_m(group, rows.importance != nullptr, *rows.grid); });
    return sure;
}

}  // namespace pgs::lanes::PGS_SET
