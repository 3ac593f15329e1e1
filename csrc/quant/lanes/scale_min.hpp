// The search for a scale and a minimum: Q2_K, Q4_K, Q5_K, and Q4_1, Q5_1 with importance; that for a scale of positive
// numbers: their scales and minimums, and IQ2_XXS.
#pragma once
#include "quant/lanes/blocks.hpp"

namespace pgs::lanes::PGS_SET {

// How a type searches: iscale = (first + delta * step + levels) / (max - min) for steps 0 to steps.
struct Steps {
    float first, delta;
    int steps;
};

// The best scale and minimum of one sub-block per lane, and what gives its levels once more.
struct Found {
    vf scale, minimum;  // as ggml returns them: the minimum negated
    vf iscale, base;    // level = nearest_int(iscale * (x - base)), clamped
    vm flat;            // all levels are zero
};

// The level of t = iscale * (x - min), as a float. Fast where |t| <= 4194303 in all lanes: then the bits of t + magic are
// in the order of the integers, and can be clamped themselves.
template <int LEVELS, bool FAST>
LANE vf level(vf t) {
    if (FAST) {
        constexpr int32_t zero = magic_bits;
        return (vf)clamp((vi)(t + magic), zero, zero + LEVELS) - magic;
    }
    return to_float(clamp(nearest_int(t), 0, LEVELS));
}

template <bool MAD>
LANE vf cost(vf difference) {
    return MAD ? absolute(difference) : difference * difference;
}

template <int N, int LEVELS, bool FAST, int K>
LANE void sums(const vf (*x)[N], const vf (*w)[N], vf (*l)[N], const vf* iscale, const vf* base, vf* sl, vf* sl2,
               vf* sxl) {
    for (int k = 0; k < K; ++k) sl[k] = sl2[k] = sxl[k] = vf{};
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
        for (int k = 0; k < K; ++k) {
            const vf at = level<LEVELS, FAST>(iscale[k] * (x[k][i] - base[k]));
            l[k][i] = at;
            const vf wl = w[k][i] * at;
            sl[k] += wl;
            sl2[k] += wl * at;
            sxl[k] += wl * x[k][i];
        }
}

template <int N, bool MAD, int K>
LANE void errors(const vf (*x)[N], const vf (*w)[N], const vf (*l)[N], const vf* scale, const vf* base, vf* error) {
    for (int k = 0; k < K; ++k) error[k] = vf{};
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
        for (int k = 0; k < K; ++k) error[k] += w[k][i] * cost<MAD>(scale[k] * l[k][i] + base[k] - x[k][i]);
}

// ggml's make_qkx2_quants and make_qkx3_quants (which differ in nothing that can be seen with weights given, but that the
// latter takes max <= min for flat; min <= 0, and max < min only if all are negative: both have max >= min before that).
// K sub-blocks of each lane's superblock at once: their sums do not wait for each other.
template <int N, int LEVELS, bool MAD, int K>
LANE void search_scale_min(const vf (*x)[N], const vf (*w)[N], const Steps& steps, Found* found) {
    vf lowest[K], highest[K], least[K], sw[K], sx[K], base[K], iscale[K], scale[K], best[K], best_iscale[K],
        best_base[K];
    vm flat[K];
    vf l[K][N], sl[K], sl2[K], sxl[K];
    bool fast = true;
    for (int k = 0; k < K; ++k) {
        lowest[k] = highest[k] = x[k][0];
        sw[k] = w[k][0];
        sx[k] = sw[k] * x[k][0];
    }
    for (int i = 1; i < N; ++i)
        for (int k = 0; k < K; ++k) {
            lowest[k] = lesser(x[k][i], lowest[k]);
            highest[k] = larger(x[k][i], highest[k]);
            sw[k] += w[k][i];
            sx[k] += w[k][i] * x[k][i];
        }
    // t is monotonic in x: where it is small at both ends it is small for all.
    auto small = [&](int k, vf at) __attribute__((always_inline)) {
        const vf a = at * (highest[k] - base[k]), b = at * (least[k] - base[k]);
        return (vm)((less_equal(absolute(a), splat(4194303.f)) & less_equal(absolute(b), splat(4194303.f))) | flat[k]);
    };
    for (int k = 0; k < K; ++k) {
        least[k] = lowest[k];
        base[k] = select(greater(lowest[k], vf{}), vf{}, lowest[k]);
        flat[k] = less_equal(highest[k], base[k]);
        iscale[k] = (float)LEVELS / (highest[k] - base[k]);
        scale[k] = 1.0f / iscale[k];
        best_iscale[k] = iscale[k];
        best_base[k] = base[k];
        fast = fast && all(small(k, iscale[k]));
    }
    if (fast)
        sums<N, LEVELS, true, K>(x, w, l, iscale, base, sl, sl2, sxl);
    else
        sums<N, LEVELS, false, K>(x, w, l, iscale, base, sl, sl2, sxl);
    errors<N, MAD, K>(x, w, l, scale, base, best);
    for (int step = 0; step <= steps.steps; ++step) {
        const float wanted = steps.first + steps.delta * (float)step + (float)LEVELS;
        fast = true;
        for (int k = 0; k < K; ++k) {
            iscale[k] = wanted / (highest[k] - base[k]);
            fast = fast && all(small(k, iscale[k]));
        }
        if (fast)
            sums<N, LEVELS, true, K>(x, w, l, iscale, base, sl, sl2, sxl);
        else
            sums<N, LEVELS, false, K>(x, w, l, iscale, base, sl, sl2, sxl);
        vf new_scale[K], new_base[K], error[K];
        vm valid[K];
        for (int k = 0; k < K; ++k) {
            const vf determinant = sw[k] * sl2[k] - sl[k] * sl[k];
            valid[k] = greater(determinant, vf{});
            new_scale[k] = (sw[k] * sxl[k] - sx[k] * sl[k]) / determinant;
            new_base[k] = (sl2[k] * sx[k] - sl[k] * sxl[k]) / determinant;
            const vm positive = greater(new_base[k], vf{});
            new_base[k] = select(positive, vf{}, new_base[k]);
            new_scale[k] = select(positive, sxl[k] / sl2[k], new_scale[k]);
        }
        errors<N, MAD, K>(x, w, l, new_scale, new_base, error);
        for (int k = 0; k < K; ++k) {
            const vm better = valid[k] & less(error[k], best[k]);
            best_iscale[k] = select(better, iscale[k], best_iscale[k]);
            best_base[k] = select(better, base[k], best_base[k]);
            best[k] = select(better, error[k], best[k]);
            scale[k] = select(better, new_scale[k], scale[k]);
            base[k] = select(better, new_base[k], base[k]);
        }
    }
    for (int k = 0; k < K; ++k) {
        const vf first = select(greater(lowest[k], vf{}), vf{}, lowest[k]);
        found[k] = {select(flat[k], vf{}, scale[k]), -select(flat[k], first, base[k]), best_iscale[k], best_base[k],
                    flat[k]};
    }
}

// The level that the search found for one number.
template <int LEVELS>
LANE vi searched_level(const Found& f, vf x) {
    return select(f.flat, vi{}, clamp(nearest_int(f.iscale * (x - f.base)), 0, LEVELS));
}

// ggml's make_qp_quants: n numbers per lane as `scale` times levels of 8 bits.
template <int N>
LANE vf quantize_positive(const vf* x, const vf* w, int levels, vi* L) {
    vf most = {};
    for (int i = 0; i < N; ++i) most = larger(most, x[i]);
    const vm nothing = less(most, splat(group_max_eps));
    vf iscale = (float)levels / most;
    const vf scale = 1.0f / iscale;
    vf best = {};
    for (int i = 0; i < N; ++i) {
        const vf difference = x[i] - scale * to_float(nearest_int(iscale * x[i]) & 0xff);
        best += w[i] * difference * difference;
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const vf other = (0.1f * (float)step + (float)levels) / most, other_scale = 1.0f / other;
        vf error = {};
        for (int i = 0; i < N; ++i) {
            const vf difference = x[i] - other_scale * to_float(lesser(splat(levels), nearest_int(other * x[i])));
            error += w[i] * difference * difference;
        }
        const vm better = less(error, best);
        best = select(better, error, best);
        iscale = select(better, other, iscale);
    }
    vf slx = {}, sl2 = {};
    for (int i = 0; i < N; ++i) {
        const vi l = lesser(splat(levels), nearest_int(iscale * x[i]));
        L[i] = l & 0xff;
        slx += w[i] * x[i] * to_float(l);
        sl2 += w[i] * to_float(l) * to_float(l);
    }
    // A round that changes nothing is followed by none that does, so lanes need not stop on their own.
    bool changed = true;
    for (int round = 0; round < 5 && changed; ++round) {
        changed = false;
        for (int i = 0; i < N; ++i) {
            const vf l = to_float(L[i]);
            vf other_lx = slx - w[i] * x[i] * l, other_l2 = sl2 - w[i] * l * l;
            const vi now = lesser(splat(levels), nearest_int(x[i] * other_l2 / other_lx));
            const vm moved = (vm)(greater(other_lx, vf{}) & greater(other_l2, vf{}) & negate(equal(now, L[i])));
            if (!any(moved)) continue;
            other_lx += w[i] * x[i] * to_float(now);
            other_l2 += w[i] * to_float(now) * to_float(now);
            const vm better = (vm)(moved & greater(other_lx * other_lx * sl2, slx * slx * other_l2));
            L[i] = select(better, now & 0xff, L[i]);
            slx = select(better, other_lx, slx);
            sl2 = select(better, other_l2, sl2);
            changed |= any(better);
        }
    }
    for (int i = 0; i < N; ++i) L[i] = select(nothing, vi{}, L[i]);
    return select((vm)(greater(sl2, vf{}) & negate(nothing)), slx / sl2, vf{});
}

}  // namespace pgs::lanes::PGS_SET
