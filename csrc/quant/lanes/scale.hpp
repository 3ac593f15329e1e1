// The search for a scale with a sign: Q3_K, Q6_K, and Q4_0, Q5_0 with importance.
#pragma once
#include "quant/lanes/blocks.hpp"

namespace pgs::lanes::PGS_SET {

// Each lane's number of largest magnitude, the first of several, and that magnitude.
struct Extreme {
    vf value, magnitude;
};
template <int N>
LANE Extreme extreme(const vf* x) {
    Extreme e{};
    for (int i = 0; i < N; ++i) {
        const vf a = absolute(x[i]);
        const vm more = greater(a, e.magnitude);
        e.magnitude = select(more, a, e.magnitude);
        e.value = select(more, x[i], e.value);
    }
    return e;
}

// nearest_int(t), clamped, as a float. |t| stays far below 2^22 here, where the bits of t + magic are in the order of the
// integers.
template <int LEVELS>
LANE vf signed_level(vf t) {
    constexpr int32_t zero = magic_bits;
    return (vf)clamp((vi)(t + magic), zero - LEVELS, zero + LEVELS - 1) - magic;
}

struct Scale {
    vf scale;
    vf iscale;   // what the best levels come from
    vm nothing;  // no number is large enough: all levels are zero
};

template <int LEVELS>
LANE vi levels_of(const Scale& s, vf x) {
    const vi l = (vi)(signed_level<LEVELS>(s.iscale * x) + (magic + (float)LEVELS)) - magic_bits;
    return select(s.nothing, vi{}, l);
}

// ggml's make_qx_quants with rmse_type 1: of 19 scales the one with which the weighted levels fit best. w: the weights, w * x.
template <int N, int LEVELS, int COUNT>
LANE void search_scale(const vf (*x)[N], const vf (*w)[N], const vf (*wx)[N], Scale* found) {
    vf most[COUNT], best[COUNT], slx[COUNT], sl2[COUNT], iscale[COUNT];
    auto sums = [&]() __attribute__((always_inline)) {
        for (int k = 0; k < COUNT; ++k) slx[k] = sl2[k] = vf{};
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i)
            for (int k = 0; k < COUNT; ++k) {
                const vf l = signed_level<LEVELS>(iscale[k] * x[k][i]);
                slx[k] += wx[k][i] * l;
                sl2[k] += w[k][i] * l * l;
            }
    };
    for (int k = 0; k < COUNT; ++k) {
        const Extreme e = extreme<N>(x[k]);
        found[k].nothing = less(e.magnitude, splat(group_max_eps));
        most[k] = select(found[k].nothing, splat(1.0f), e.value);
        iscale[k] = (float)-LEVELS / most[k];
        found[k].iscale = iscale[k];
    }
    sums();
    for (int k = 0; k < COUNT; ++k) {
        found[k].scale = select(equal(sl2[k], vf{}), vf{}, slx[k] / sl2[k]);
        best[k] = found[k].scale * slx[k];
    }
    for (int step = -9; step <= 9; ++step) {
        if (step == 0) continue;
        for (int k = 0; k < COUNT; ++k) iscale[k] = -((float)LEVELS + 0.1f * (float)step) / most[k];
        sums();
        for (int k = 0; k < COUNT; ++k) {
            const vm better = (vm)(greater(sl2[k], vf{}) & greater(slx[k] * slx[k], best[k] * sl2[k]));
            if (!any(better)) continue;
            const vf scale = slx[k] / sl2[k];
            found[k].scale = select(better, scale, found[k].scale);
            found[k].iscale = select(better, iscale[k], found[k].iscale);
            best[k] = select(better, scale * slx[k], best[k]);
        }
    }
    for (int k = 0; k < COUNT; ++k) found[k].scale = select(found[k].nothing, vf{}, found[k].scale);
}

}  // namespace pgs::lanes::PGS_SET
