// IQ4_NL and IQ4_XS: 16 fixed values times a scale for each 32 numbers. Lanes are blocks of 32 or superblocks of 256.
#include "quant/lanes/blocks.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

// The values, as llama.cpp's format has them (kvalues_iq4nl).
constexpr int values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int tries = 7;
constexpr int K = 2;  // blocks of each lane at once

// ggml's best_index_int8 compares x - lower < upper - x for the two values around x, and takes the upper one of equals.
// Both differences are exact where they are near each other (Sterbenz: the values' distance is below |x| there, or 11
// around -4.5), so that this is x < midpoint; and a NaN falls through to the last value there and here.
constexpr float midpoint(int i) { return 0.5f * (float)(values[i - 1] + values[i]); }
[[maybe_unused]] constexpr int index_of(float x) {
    int i = 0;
    while (i < 15 && x >= midpoint(i + 1)) ++i;
    return i;
}

// place_of() finds where the value for x is in the tables. |x| is below 136: in the search it is at most 127 + tries,
// rounded.
#if PGS_WIDTH == 16
// Buckets around the multiples of 10, by their number's lowest five bits. No two midpoints are within 10 of each other
// and none is within 0.4 of a bucket's edge, so a bucket has at most one midpoint, also if x is rounded over the edge.
// What follows the midpoint is what the next bucket begins with.
struct Tables {
    float split[32];  // the midpoint in each bucket
    float value[32];  // what each bucket begins with
    int32_t index[32];
    constexpr Tables() : split(), value(), index() {
        for (int b = -16; b < 16; ++b) {
            const int first = index_of((float)(10 * b - 5)), end = index_of((float)(10 * b + 5));
            split[b & 31] = first < end ? midpoint(end) : 200.0f;
            value[b & 31] = (float)values[first];
            index[b & 31] = first;
        }
    }
};
constexpr Tables tables;
LANE __m512i place_of(vf x) {
    const __m512i bucket = (__m512i)(x * 0.1f + magic);
    const vf split = _mm512_permutex2var_ps(load(tables.split), bucket, load(tables.split + W));
    return _mm512_mask_add_epi32(bucket, greater_equal(x, split), bucket, _mm512_set1_epi32(1));
}
LANE vf value_at(__m512i place) { return _mm512_permutex2var_ps(load(tables.value), place, load(tables.value + W)); }
LANE vi index_at(__m512i place) {
    return (vi)_mm512_permutex2var_epi32((__m512i)load_int(tables.index), place, (__m512i)load_int(tables.index + W));
}
#elif PGS_WIDTH == 8
// A search tree of four comparisons. Each makes n = 2n + (x < midpoint); the permutes get -n, of which they take the
// lowest bits. The last comparison chooses between two tables.
struct Tables {
    float split[4][8];  // for each level
    float value[2][8];
    int32_t index[2][8];
    constexpr Tables() : split(), value(), index() {
        for (int level = 0; level < 4; ++level)
            for (int n = 0; n < 8; ++n)  // s = 2^(4 - level) indices are left, from 16 - (n + 1) * s on: their middle
                split[level][-n & 7] = midpoint(16 - (n % (1 << level) * 2 + 1) * (8 >> level));
        for (int below = 0; below < 2; ++below)
            for (int n = 0; n < 8; ++n) {
                index[below][-n & 7] = 15 - (2 * n + below);
                value[below][-n & 7] = (float)values[15 - (2 * n + below)];
            }
    }
};
constexpr Tables tables;
struct Place {
    vi n;
    vm below;
};
LANE Place place_of(vf x) {
    const vm first = less(x, splat(tables.split[0][0]));
    const vm second = less(x, select(first, splat(tables.split[1][7]), splat(tables.split[1][0])));
    vi n = first + first + second;
    n += n + less(x, _mm256_permutevar_ps(load(tables.split[2]), (__m256i)n));
    return {n, less(x, _mm256_permutevar8x32_ps(load(tables.split[3]), (__m256i)n))};
}
LANE vf value_at(Place place) {
    return select(place.below, _mm256_permutevar8x32_ps(load(tables.value[1]), (__m256i)place.n),
                  _mm256_permutevar8x32_ps(load(tables.value[0]), (__m256i)place.n));
}
LANE vi index_at(Place place) {
    return select(place.below, (vi)_mm256_permutevar8x32_epi32((__m256i)load_int(tables.index[1]), (__m256i)place.n),
                  (vi)_mm256_permutevar8x32_epi32((__m256i)load_int(tables.index[0]), (__m256i)place.n));
}
#else
// All midpoints are multiples of 0.5, so the largest integer up to 2x decides.
struct Tables {
    static constexpr int zero = 272;
    float value[2 * zero];
    int32_t index[2 * zero];
    constexpr Tables() : value(), index() {
        for (int at = 0; at < 2 * zero; ++at) {
            index[at] = index_of(0.5f * (float)(at - zero));
            value[at] = (float)values[index[at]];
        }
    }
};
constexpr Tables tables;
LANE vi place_of(vf x) {
    const vf twice = x + x;
    const vi toward_zero = __builtin_convertvector(twice, vi);
    return toward_zero + less(twice, to_float(toward_zero));
}
LANE vf value_at(vi place) { return gather(tables.value + Tables::zero, place); }
LANE vi index_at(vi place) { return gather(tables.index + Tables::zero, place); }
#endif

LANE vf nearest_value(vf x) { return value_at(place_of(x)); }
// For every x: NaN becomes the highest value, as in ggml.
LANE vi nearest_index(vf x) {
    return index_at(place_of(larger(lesser(x, splat((float)values[15])), splat((float)values[0]))));
}

// The best scale of K blocks, of 15 that map the number of largest magnitude to -134 ... -120.
LANE void search(const vf (*x)[32], const vf (*w)[32], vf* scale) {
    vf most[K], best[K], sqx[K], sq2[K], inverse[K];
    vm nothing[K];
    auto sums = [&]() __attribute__((always_inline)) {
        for (int k = 0; k < K; ++k) sqx[k] = sq2[k] = vf{};
        for (int i = 0; i < 32; ++i)
            for (int k = 0; k < K; ++k) {
                const vf q = nearest_value(inverse[k] * x[k][i]);
                const vf wq = w[k][i] * q;
                sqx[k] += wq * x[k][i];
                sq2[k] += wq * q;
            }
    };
    for (int k = 0; k < K; ++k) {
        vf magnitude = {};
        most[k] = vf{};
        for (int i = 0; i < 32; ++i) {
            const vf a = absolute(x[k][i]);
            const vm more = greater(a, magnitude);
            magnitude = select(more, a, magnitude);
            most[k] = select(more, x[k][i], most[k]);
        }
        nothing[k] = less(magnitude, splat(group_max_eps));
        most[k] = select(nothing[k], splat(1.0f), most[k]);
        inverse[k] = 1.0f / (-most[k] / (float)values[0]);
    }
    sums();
    for (int k = 0; k < K; ++k) {
        scale[k] = select(greater(sq2[k], vf{}), sqx[k] / sq2[k], vf{});
        best[k] = scale[k] * sqx[k];
    }
    for (int attempt = -tries; attempt <= tries; ++attempt) {
        for (int k = 0; k < K; ++k) inverse[k] = (float)(attempt + values[0]) / most[k];
        sums();
        for (int k = 0; k < K; ++k) {
            const vm better = (vm)(greater(sq2[k], vf{}) & greater(sqx[k] * sqx[k], best[k] * sq2[k]));
            if (!any(better)) continue;
            const vf s = sqx[k] / sq2[k];
            scale[k] = select(better, s, scale[k]);
            best[k] = select(better, s * sqx[k], best[k]);
        }
    }
    for (int k = 0; k < K; ++k) scale[k] = select(nothing[k], vf{}, scale[k]);
}

// The weights of 32 numbers: by importance, or x^2.
LANE void weigh(const Group& group, bool weighted, int at, const vf* x, vf sigma2, vf* w) {
    if (weighted) return load_weights(group, at, 32, x, sigma2, w);
    for (int i = 0; i < 32; ++i) w[i] = x[i] * x[i];
}

LANE vf sum_of_squares(const vf* x, int n) {
    vf sum = {};
    for (int i = 0; i < n; ++i) sum += x[i] * x[i];
    return sum * (2.f / (float)n);
}

LANE void store_indices(const vf* x, vf inverse, unsigned char* const* target, int at) {
    for (int i = 0; i < 16; i += 4) {
        vi word = {};
        for (int b = 0; b < 4; ++b)
            word |= (nearest_index(inverse * x[i + b]) | nearest_index(inverse * x[16 + i + b]) << 4) << 8 * b;
        store_words(word, target, at + i);
    }
}

// One block of 32 for each lane and each k; the lanes of the second group may repeat the last block.
LANE void encode_nl(const Group (&groups)[K], bool weighted) {
    vf x[K][32], w[K][32], scale[K];
    for (int k = 0; k < K; ++k) {
        load_columns(groups[k].values, 32, x[k]);
        weigh(groups[k], weighted, 0, x[k], sum_of_squares(x[k], 32), w[k]);
    }
    search(x, w, scale);
    for (int k = 0; k < K; ++k) {
        store_halves((vi)float_to_half(scale[k]), groups[k].target, 0);
        const vf inverse = select(equal(scale[k], vf{}), vf{}, 1.0f / scale[k]);
        store_indices(x[k], inverse, groups[k].target, 2);
    }
}

LANE void encode_xs(const Group& group, bool weighted) {
    vf x[256], w[K][32], scales[8];
    load_columns(group.values, 256, x);
    const vf sigma2 = sum_of_squares(x, 256);
    for (int j = 0; j < 8; j += K) {
        for (int k = 0; k < K; ++k) weigh(group, weighted, (j + k) * 32, x + (j + k) * 32, sigma2, w[k]);
        search((const vf(*)[32])(x + j * 32), w, scales + j);
    }
    vf magnitude = {}, most = {};
    for (int j = 0; j < 8; ++j) {
        const vf a = absolute(scales[j]);
        const vm more = greater(a, magnitude);
        magnitude = select(more, a, magnitude);
        most = select(more, scales[j], most);
    }
    const vf d = -most / 32.0f;
    const vf inverse = select(equal(d, vf{}), vf{}, 1.0f / d);
    vi high = {}, low = {};
    for (int j = 0; j < 8; ++j) {
        const vi l = clamp(nearest_int(inverse * scales[j]), -32, 31);
        const vf dl = d * to_float(l);
        store_indices(x + j * 32, select(equal(dl, vf{}), vf{}, 1.0f / dl), group.target, 8 + 16 * j);
        low |= ((l + 32) & 15) << 4 * j;
        high |= (l + 32) >> 4 << 2 * j;
    }
    store_words((vi)float_to_half(d) | high << 16, group.target, 0);
    store_words(low, group.target, 4);
}

}  // namespace

bool encode_iq4_nl(const Rows& rows) {
    Group groups[K];
    int have = 0;
    for_groups(rows, 32, 18, [&](const Group& group) {
        groups[have++] = group;
        if (have < K) return;
        encode_nl(groups, rows.importance != nullptr);
        have = 0;
    });
    if (have) {
        for (int k = have; k < K; ++k) groups[k] = groups[0];
        encode_nl(groups, rows.importance != nullptr);
    }
    return true;
}

bool encode_iq4_xs(const Rows& rows) {
    for_groups(rows, 256, 136, [&](const Group& group) { encode_xs(group, rows.importance != nullptr); });
    return true;
}

}  // namespace pgs::lanes::PGS_SET
