// Q2_K, Q4_K, Q5_K: sub-blocks with a scale and a minimum. Lanes are superblocks of 256.
#include "quant/lanes/scale_min.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

// A superblock per lane: all its numbers, and what the search found for each sub-block.
template <int N>
struct Superblock {
    vf x[256];
    Found found[256 / N];
    vf sw[256 / N];
};

template <int N, int LEVELS, bool MAD>
LANE void search_all(const Group& group, bool weighted, float sigma_factor, Steps steps, Superblock<N>& s) {
    constexpr int K = 2;
    load_columns(group.values, 256, s.x);
    vf sigma2 = {};
    if (weighted) {
        for (int i = 0; i < 256; ++i) sigma2 += s.x[i] * s.x[i];
        sigma2 = sigma_factor * sigma2 / 256.0f;
    }
    vf w[K][N];
    for (int j = 0; j < 256 / N; j += K) {
        const vf(*x)[N] = (const vf(*)[N])(s.x + j * N);
        if (weighted) {
            load_weights(group, j * N, K * N, x[0], sigma2, w[0]);
            for (int k = 0; k < K; ++k) {
                vf sum = {};
                for (int i = 0; i < N; ++i) sum += w[k][i];
                s.sw[j + k] = sum;
            }
        } else {
            for (int k = 0; k < K; ++k) {
                vf average = {};
                if (!MAD) {
                    for (int i = 0; i < N; ++i) average += x[k][i] * x[k][i];
                    average = square_root(average / (float)N);
                }
                for (int i = 0; i < N; ++i) w[k][i] = MAD ? absolute(x[k][i]) : average + absolute(x[k][i]);
            }
        }
        search_scale_min<N, LEVELS, MAD, K>(x, w, steps, s.found + j);
    }
}

// The levels of sub-block j for its final scale d and minimum m; where d is zero those of the search stay.
template <int N, int LEVELS>
LANE void final_levels(const Superblock<N>& s, int j, vf d, vf m, vi* L) {
    const vf* x = s.x + j * N;
    const vm zero = equal(d, vf{});
    for (int i = 0; i < N; ++i) L[i] = clamp(nearest_int((x[i] + m) / d), 0, LEVELS);
    if (!any(zero)) return;
    for (int i = 0; i < N; ++i) L[i] = select(zero, searched_level<LEVELS>(s.found[j], x[i]), L[i]);
}

LANE vf final_scale(vf d) { return half_to_float(float_to_half(d)); }

// Scales and minimums of Q4_K and Q5_K, six bits each in 12 bytes, as ggml packs them; what it reads back.
struct SixBits {
    vi scale[8], minimum[8];
};

LANE SixBits pack_six_bits(const vi* ls, const vi* lm, const Group& group) {
    vi byte[12];
    for (int j = 0; j < 4; ++j) {
        byte[j] = (ls[j] | (ls[j + 4] >> 4) << 6) & 0xff;
        byte[j + 4] = (lm[j] | (lm[j + 4] >> 4) << 6) & 0xff;
        byte[j + 8] = (ls[j + 4] & 15) | (lm[j + 4] & 15) << 4;
    }
    for (int j = 0; j < 12; j += 4) store_words(word_of(byte + j), group.target, 4 + j);
    SixBits six;
    for (int j = 0; j < 4; ++j) {
        six.scale[j] = byte[j] & 63;
        six.minimum[j] = byte[j + 4] & 63;
        six.scale[j + 4] = (byte[j + 8] & 15) | byte[j] >> 6 << 4;
        six.minimum[j + 4] = byte[j + 8] >> 4 | byte[j + 4] >> 6 << 4;
    }
    return six;
}

// Levels of 4 or 5 bits; those of sub-blocks 2 p and 2 p + 1 share bytes.
template <int BITS>
LANE void encode_group(const Group& group, bool weighted) {
    constexpr int levels = (1 << BITS) - 1;
    Superblock<32> s;
    const Steps steps = weighted ? Steps{-0.9f, 0.05f, 36} : BITS == 4 ? Steps{-1.f, 0.1f, 20} : Steps{-0.5f, 0.1f, 15};
    search_all<32, levels, false>(group, weighted, 2.0f, steps, s);
    vi ls[8], lm[8];
    vf d, m, scales[8], minimums[8];
    for (int j = 0; j < 8; ++j) scales[j] = s.found[j].scale, minimums[j] = s.found[j].minimum;
    if (weighted) {
        d = quantize_positive<8>(scales, s.sw, 63, ls);
        m = quantize_positive<8>(minimums, s.sw, 63, lm);
        if (BITS == 5)
            for (int j = 0; j < 8; ++j) ls[j] = lesser(ls[j], splat(63)), lm[j] = lesser(lm[j], splat(63));
    } else {
        vf most = {}, most_m = {};
        for (int j = 0; j < 8; ++j) most = larger(scales[j], most), most_m = larger(minimums[j], most_m);
        const vf inverse = select(greater(most, vf{}), 63.f / most, vf{});
        const vf inverse_m = select(greater(most_m, vf{}), 63.f / most_m, vf{});
        for (int j = 0; j < 8; ++j) {
            ls[j] = lesser(nearest_int(inverse * scales[j]) & 0xff, splat(63));
            lm[j] = lesser(nearest_int(inverse_m * minimums[j]) & 0xff, splat(63));
        }
        d = most / 63.f;
        m = most_m / 63.f;
    }
    store_words((vi)float_to_half(d) | (vi)float_to_half(m) << 16, group.target, 0);
    const SixBits six = pack_six_bits(ls, lm, group);
    d = final_scale(d);
    m = final_scale(m);
    constexpr int low = BITS == 4 ? 16 : 48;
    vi high[8] = {};
    for (int p = 0; p < 4; ++p) {
        vi L[2][32];
        for (int k = 0; k < 2; ++k)
            final_levels<32, levels>(s, 2 * p + k, d * to_float(six.scale[2 * p + k]),
                                     m * to_float(six.minimum[2 * p + k]), L[k]);
        for (int i = 0; i < 32; i += 4) {
            vi word = {};
            for (int b = 0; b < 4; ++b) {
                const vi l0 = L[0][i + b], l1 = L[1][i + b];
                word |= ((l0 & 15) | (l1 & 15) << 4) << 8 * b;
                if (BITS == 5) high[i / 4] |= (l0 >> 4 | l1 >> 4 << 1) << (2 * p + 8 * b);
            }
            store_words(word, group.target, low + 32 * p + i);
        }
    }
    if (BITS == 5)
        for (int i = 0; i < 8; ++i) store_words(high[i], group.target, 16 + 4 * i);
}

}  // namespace

bool encode_q4_k(const Rows& rows) {
    for_groups(rows, 256, 144, [&](const Group& group) { encode_group<4>(group, rows.importance != nullptr); });
    return true;
}

bool encode_q5_k(const Rows& rows) {
    for_groups(rows, 256, 176, [&](const Group& group) { encode_group<5>(group, rows.importance != nullptr); });
    return true;
}

namespace {

template <bool WEIGHTED>
LANE void encode_q2_k_group(const Group& group) {
    Superblock<16> s;
    search_all<16, 3, !WEIGHTED>(group, WEIGHTED, 1.0f, WEIGHTED ? Steps{-0.9f, 0.05f, 36} : Steps{-0.5f, 0.1f, 15}, s);
    vi ls[16], lm[16], both[16];
    vf d, m, scales[16], minimums[16];
    for (int j = 0; j < 16; ++j) scales[j] = s.found[j].scale, minimums[j] = s.found[j].minimum;
    if (WEIGHTED) {
        d = quantize_positive<16>(scales, s.sw, 15, ls);
        m = quantize_positive<16>(minimums, s.sw, 15, lm);
    } else {
        vf most = {}, most_m = {};
        for (int j = 0; j < 16; ++j) most = larger(scales[j], most), most_m = larger(minimums[j], most_m);
        const vm some = greater(most, vf{}), some_m = greater(most_m, vf{});
        const vf inverse = 15.f / most, inverse_m = 15.f / most_m;
        for (int j = 0; j < 16; ++j) {
            ls[j] = select(some, nearest_int(inverse * scales[j]), vi{});
            lm[j] = select(some_m, nearest_int(inverse_m * minimums[j]), vi{});
        }
        d = select(some, most / 15.f, vf{});
        m = select(some_m, most_m / 15.f, vf{});
    }
    for (int j = 0; j < 16; ++j) both[j] = (ls[j] | lm[j] << 4) & 0xff;
    for (int j = 0; j < 16; j += 4) store_words(word_of(both + j), group.target, j);
    store_words((vi)float_to_half(d) | (vi)float_to_half(m) << 16, group.target, 80);
    d = final_scale(d);
    m = final_scale(m);
    for (int h = 0; h < 2; ++h) {
        vi byte[32] = {};
        for (int q = 0; q < 4; ++q)
            for (int k = 0; k < 2; ++k) {
                const int j = 8 * h + 2 * q + k;
                vi L[16];
                final_levels<16, 3>(s, j, d * to_float(both[j] & 15), m * to_float(both[j] >> 4), L);
                for (int i = 0; i < 16; ++i) byte[16 * k + i] |= L[i] << 2 * q;
            }
        for (int i = 0; i < 32; i += 4) store_words(word_of(byte + i), group.target, 16 + 32 * h + i);
    }
}

}  // namespace

bool encode_q2_k(const Rows& rows) {
    if (rows.importance)
        for_groups(rows, 256, 84, [](const Group& group) { encode_q2_k_group<true>(group); });
    else
        for_groups(rows, 256, 84, [](const Group& group) { encode_q2_k_group<false>(group); });
    return true;
}

}  // namespace pgs::lanes::PGS_SET
