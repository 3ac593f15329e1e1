// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q1_0, Q2_0, TQ1_0, TQ2_0: a scale, or a scale and a minimum, for each block. Lanes are blocks.
#include "quant/lanes/scale.hpp"
#include "quant/lanes/scale_min.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

// The 32 levels of a block, numbers i and i + 16 in a byte; the fifth bits, if there are any, as a word before that.
template <int BITS>
LANE void store_levels(const vi* l, unsigned char* const* target, int at) {
    if (BITS == 5) {
        vi high = {};
        for (int i = 0; i < 32; ++i) high |= (l[i] >> 4 & 1) << i;
        store_words(high, target, at);
        at += 4;
    }
    for (int i = 0; i < 16; i += 4) {
        vi pair[4];
        for (int b = 0; b < 4; ++b) pair[b] = (l[i + b] & 15) | (l[16 + i + b] & 15) << 4;
        store_words(word_of(pair), target, at + i);
    }
}

LANE vf inverse_of(vf d) { return select(equal(d, vf{}), vf{}, 1.0f / d); }

// A cast of float to int8_t as x86 does it.
LANE vi to_int8(vf v) { return truncate(v) << 24 >> 24; }

template <int BITS>
LANE void encode_scale(const Group& group) {
    vf x[32];
    vi l[32];
    load_columns(group.values, 32, x);
    constexpr int half = 1 << (BITS - 1);
    const vf d = extreme<32>(x).value / (float)-half, inverse = inverse_of(d);
    for (int i = 0; i < 32; ++i) l[i] = lesser(to_int8(x[i] * inverse + (float)half + 0.5f), splat(2 * half - 1));
    store_halves((vi)float_to_half(d), group.target, 0);
    store_levels<BITS>(l, group.target, 2);
}

template <int BITS>
LANE void encode_scale_min(const Group& group) {
    vf x[32];
    vi l[32];
    load_columns(group.values, 32, x);
    constexpr int levels = (1 << BITS) - 1;
    vf lowest = x[0], highest = x[0];
    for (int i = 1; i < 32; ++i) {
        lowest = lesser(x[i], lowest);
        highest = larger(x[i], highest);
    }
    const vf d = (highest - lowest) / (float)levels, inverse = inverse_of(d);
    for (int i = 0; i < 32; ++i) {
        const vf v = (x[i] - lowest) * inverse + 0.5f;
        l[i] = BITS == 4 ? lesser(to_int8(v), splat(levels)) : truncate(v);
    }
    store_words((vi)float_to_half(d) | (vi)float_to_half(lowest) << 16, group.target, 0);
    store_levels<BITS>(l, group.target, 4);
}

// With importance: the mean square of each row, lanes being rows, for W rows at a time; then groups of blocks of these
// rows, two groups at once.
template <class Work>
LANE void for_weighted_groups(const Rows& all, uint32_t bytes, Work work) {
    constexpr int K = 2;
    const uint64_t row_bytes = all.row_elements / 32 * bytes;
    for (uint64_t first = 0; first < all.rows; first += W) {
        Rows rows = all;
        rows.values += first * all.row_elements;
        rows.target += first * row_bytes;
        rows.rows = all.rows - first < W ? all.rows - first : W;
        vf sum = {};
        for (uint64_t at = 0; at < all.row_elements; at += 32) {
            const float* values[W];
            for (uint64_t j = 0; j < W; ++j) values[j] = rows.values + (j < rows.rows ? j : 0) * all.row_elements + at;
            vf x[32];
            load_columns(values, 32, x);
            for (int i = 0; i < 32; ++i) sum += x[i] * x[i];
        }
        float sigma2[W];
        store(sigma2, sum / (float)(int64_t)all.row_elements);
        vf x[K][32], w[K][32];
        Group groups[K];
        int have = 0;
        auto run = [&]() __attribute__((always_inline)) {
            for (int k = 0; k < K; ++k) {
                float s[W];
                for (int j = 0; j < W; ++j) s[j] = sigma2[groups[k].row[j]];
                const vf squares = load(s);
                load_columns(groups[k].values, 32, x[k]);
                load_weights(groups[k], 0, 32, x[k], squares, w[k]);
            }
            work(x, w, groups);
            have = 0;
        };
        for_groups(rows, 32, bytes, [&](const Group& group) __attribute__((always_inline)) {
            groups[have++] = group;
            if (have == K) run();
        });
        if (have) {
            groups[1] = groups[0];
            run();
        }
    }
}

template <int BITS>
bool encode_weighted_scale(const Rows& rows) {
    for_weighted_groups(rows, BITS == 4 ? 18 : 22, [](const vf(*x)[32], const vf(*w)[32], const Group* groups) {
        vf wx[2][32];
        Scale found[2];
        for (int k = 0; k < 2; ++k)
            for (int i = 0; i < 32; ++i) wx[k][i] = w[k][i] * x[k][i];
        search_scale<32, 1 << (BITS - 1), 2>(x, w, wx, found);
        for (int k = 0; k < 2; ++k) {
            vi l[32];
            for (int i = 0; i < 32; ++i) l[i] = levels_of<1 << (BITS - 1)>(found[k], x[k][i]);
            store_halves((vi)float_to_half(found[k].scale), groups[k].target, 0);
            store_levels<BITS>(l, groups[k].target, 2);
        }
    });
    return true;
}

template <int BITS>
bool encode_weighted_scale_min(const Rows& rows) {
    constexpr int levels = (1 << BITS) - 1;
    for_weighted_groups(rows, BITS == 4 ? 20 : 24, [](const vf(*x)[32], const vf(*w)[32], const Group* groups) {
        Found found[2];
        search_scale_min<32, levels, false, 2>(x, w, Steps{-0.9f, 0.05f, 36}, found);
        for (int k = 0; k < 2; ++k) {
            vi l[32];
            for (int i = 0; i < 32; ++i) l[i] = searched_level<levels>(found[k], x[k][i]);
            store_words((vi)float_to_half(found[k].scale) | (vi)float_to_half(-found[k].minimum) << 16,
                        groups[k].target, 0);
            store_levels<BITS>(l, groups[k].target, 4);
        }
    });
    return true;
}

}  // namespace

bool encode_q4_0(const Rows& rows) {
    if (rows.importance) return encode_weighted_scale<4>(rows);
    for_groups(rows, 32, 18, [](const Group& group) { encode_scale<4>(group); });
    return true;
}

bool encode_q4_1(const Rows& rows) {
    if (rows.importance) return encode_weighted_scale_min<4>(rows);
    for_groups(rows, 32, 20, [](const Group& group) { encode_scale_min<4>(group); });
    return true;
}

bool encode_q5_0(const Rows& rows) {
    if (rows.importance) return encode_weighted_scale<5>(rows);
    for_groups(rows, 32, 22, [](const Group& group) { encode_scale<5>(group); });
    return true;
}

bool encode_q5_1(const Rows& rows) {
    if (rows.importance) return encode_weighted_scale_min<5>(rows);
    for_groups(rows, 32, 24, [](const Group& group) { encode_scale_min<5>(group); });
    return true;
}

bool encode_q8_0(const Rows& rows) {
    for_groups(rows, 32, 34, [](const Group& group) {
        vf x[32];
        load_columns(group.values, 32, x);
        const vf d = largest_of(x, 32) / 127.0f, inverse = inverse_of(d);
        store_halves((vi)float_to_half(d), group.target, 0);
        for (int i = 0; i < 32; i += 4) {
            vi l[4];
            for (int b = 0; b < 4; ++b) l[b] = round_away(x[i + b] * inverse) & 0xff;
            store_words(word_of(l), group.target, 2 + i);
        }
    });
    return true;
}

// --- of one and two bits, and of three values ---

bool encode_q1_0(const Rows& rows) {
    for_groups(rows, 128, 18, [](const Group& group) {
        vf sum = {};
        for (int part = 0; part < 4; ++part) {
            vf x[32];
            vi bits = {};
            load_values(group, 32 * part, 32, x);
            for (int i = 0; i < 32; ++i) {
                sum += absolute(x[i]);
                bits |= select(less(x[i], vf{}), vi{}, splat((int32_t)(1u << i)));
            }
            store_words(bits, group.target, 2 + 4 * part);
        }
        store_halves((vi)float_to_half(sum / 128.0f), group.target, 0);
    });
    return true;
}

bool encode_q2_0(const Rows& rows) {
    for_groups(rows, 64, 18, [](const Group& group) {
        vf x[64];
        load_columns(group.values, 64, x);
        const vf d = largest_of(x, 64), inverse = inverse_of(d);
        store_halves((vi)float_to_half(d), group.target, 0);
        for (int i = 0; i < 64; i += 16) {
            vi word = {};
            for (int b = 0; b < 16; ++b) word |= clamp(round_away(x[i + b] * inverse) + 1, 0, 3) << 2 * b;
            store_words(word, group.target, 2 + i / 4);
        }
    });
    return true;
}

namespace {

// 0, 1, 2 for -1, 0, 1 times the largest magnitude. Where its inverse is infinite lroundf has no answer, and the cast of
// what x86 gives to int is 0.
LANE vi trit(vf v) {
    const vi l = round_away(v);
    return select(equal(l, splat((int32_t)0x80000000)), vi{}, l) + 1;
}

}  // namespace

bool encode_tq1_0(const Rows& rows) {
    for_groups(rows, 256, 54, [](const Group& group) {
        vf x[256];
        load_columns(group.values, 256, x);
        const vf d = largest_of(x, 256), inverse = inverse_of(d);
        store_halves((vi)float_to_half(d), group.target, 52);
        // Bytes of up to five trits, the first the most significant, `apart` numbers from each other.
        auto bytes = [&](int first, int count, int apart, int trits, int at) __attribute__((always_inline)) {
            for (int i = 0; i < count; i += 4) {
                vi q[4] = {};
                for (int b = 0; b < 4; ++b) {
                    for (int n = 0; n < trits; ++n) q[b] = q[b] * 3 + trit(x[first + i + b + n * apart] * inverse);
                    if (trits == 4) q[b] = q[b] * 3;
                    // (q * 256 + 242) / 243 rounded down, which is the ceiling of q * 256 / 243, for q up to 242.
                    // 8631 / 2^21 is near enough to 1 / 243.
                    q[b] = (q[b] * 256 + 242) * 8631 >> 21;
                }
                store_words(word_of(q), group.target, at + i);
            }
        };
        bytes(0, 32, 32, 5, 0);
        bytes(160, 16, 16, 5, 32);
        bytes(240, 4, 4, 4, 48);
    });
    return true;
}

bool encode_tq2_0(const Rows& rows) {
    for_groups(rows, 256, 66, [](const Group& group) {
        vf x[256];
        load_columns(group.values, 256, x);
        const vf d = largest_of(x, 256), inverse = inverse_of(d);
        store_halves((vi)float_to_half(d), group.target, 64);
        for (int h = 0; h < 2; ++h)
            for (int i = 0; i < 32; i += 4) {
                vi q[4] = {};
                for (int b = 0; b < 4; ++b)
                    for (int n = 0; n < 4; ++n) q[b] |= (trit(x[128 * h + 32 * n + i + b] * inverse) & 3) << 2 * n;
                store_words(word_of(q), group.target, 32 * h + i);
            }
    });
    return true;
}

}  // namespace pgs::lanes::PGS_SET
