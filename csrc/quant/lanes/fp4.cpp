// MXFP4 and NVFP4: values of four bits (E2M1) times a scale. Lanes are blocks.
#include "quant/lanes/blocks.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

// The code of ggml's linear search for the nearest of 0, 1, 2, 3, 4, 6, 8, 12 times d and their negatives, the first of
// equals: how many midpoints |x| exceeds. Products of d (a few bits) are exact, and so are the two differences that decide
// (Sterbenz's lemma); at a midpoint the smaller magnitude comes first, and so does +0.
LANE vi code_of(vf x, vf d) {
    constexpr float midpoints[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5.0f, 7.0f, 10.0f};
    const vf a = absolute(x);
    vi code = {};
#pragma GCC unroll 7
    for (int i = 0; i < 7; ++i) {
        const vm above = greater(a, midpoints[i] * d);
        code = select(above, splat(i + 1), code);
    }
    return code | select(greater(code, vi{}), (vi)((vu)x >> 31 << 3), vi{});
}

LANE vf value_of(vi code) {
    const vi m = code & 7;
    const vi q = m + larger(m - 4, vi{}) + select(equal(m, splat(7)), splat(2), vi{});
    return (vf)((vi)to_float(q) | (code & 8) << 28);
}

// --- MXFP4 ---

// Just below a power of two log2f rounds up to it, so that floorf(log2f(x)) is one too large. How many of the largest
// mantissas of an exponent that takes: the spacing of floats just below |log2 x| in [2^k, 2^(k+1)) is 2^(k-23), a step of the
// mantissa changes log2 x by 2^-24 / ln 2, so floor(ln 2 * 2^k) of them round up. test_kernels.py compares all of them
// with ggml.
LANE vi rounded_up(vi exponent) {
    const vi power = exponent - 126;                                   // log2 of the power of two above
    const vi below = select(greater(power, vi{}), power - 1, -power);  // |log2 x| just below it, rounded down
    constexpr int more[6] = {1, 1, 3, 6, 11, 22};                      // floor(ln 2 * 2^k) is 0, 1, 2, 5, 11, 22, 44
    vi count = {};
    for (int k = 0; k < 6; ++k) count += select(less(below, splat(2 << k)), vi{}, splat(more[k]));
    return count;
}

// The exponent that ggml gives a block by its largest magnitude; 0 for a block of zeros. It is floor(log2) - 2 + 127, wrapping
// as the cast to a byte does on x86: below 2^-125 it comes out large, which makes all numbers of the block zero or, as 255,
// has no meaning to llama.cpp.
LANE vi exponent_of(vf most) {
    const vi bits = (vi)most, exponent = bits >> 23;
    const vi up = select(greater(bits & 0x7fffff, 0x7fffff - rounded_up(exponent)), splat(1), vi{});
    vi e = exponent + up - 2;
    const vm denormal = (vm)(less(bits, splat(1 << 23)) & greater(bits, vi{}));
    if (any(denormal)) {
        const vi highest = ((vi)to_float(bits) >> 23) - 127;  // bit; log2 is that - 149
        // As above, but a step is 2^-149 whatever the power of two: 44 * 2^-24 and 88 * 2^-24 (from 128 on) in such steps.
        constexpr int below[6] = {1, 1, 3, 6, 0, 11};  // 1, 2, 5, 11, 11, 22 for powers of two 2^18 to 2^23
        vi count = {};
        for (int k = 0; k < 6; ++k) count += select(less(highest, splat(17 + k)), vi{}, splat(below[k]));
        const vi next = (vi)(splat(2) << highest);
        e = select(denormal, highest - 24 + select(greater(bits, next - 1 - count), splat(1), vi{}), e);
    }
    return select(equal(bits, vi{}), vi{}, e & 0xff);
}

// GGML_E8M0_TO_FP32_HALF.
LANE vf scale_of(vi e) { return (vf)select(less(e, splat(2)), splat(0x00200000) << (e & 1), (e - 1) << 23); }

LANE void store_mxfp4(const vi* code, vi e, const Group& group) {
    store_bytes(e, group.target, 0);
    for (int i = 0; i < 16; i += 4) {
        vi pair[4];
        for (int b = 0; b < 4; ++b) pair[b] = code[i + b] | code[16 + i + b] << 4;
        store_words(word_of(pair), group.target, 1 + i);
    }
}

// Blocks whose largest magnitude is below this (and not zero) have a scale that wraps or that llama.cpp refuses.
constexpr int32_t least_bits = 4 << 23;

// Squared error of a block by importance, as a plain sum in order, and its codes.
LANE vf codes_and_error(const vf* x, const vf* w, vf d, vi* code) {
    vf error = {};
    for (int i = 0; i < 32; ++i) {
        code[i] = code_of(x[i], d);
        const vf difference = value_of(code[i]) * d - x[i];
        error += w ? w[i] * difference * difference : difference * difference;
    }
    return error;
}

}  // namespace

bool encode_mxfp4(const Rows& rows) {
    for_groups(rows, 32, 17, [](const Group& group) {
        vf x[32];
        vi code[32];
        load_columns(group.values, 32, x);
        const vi e = exponent_of(largest_of(x, 32));
        const vf d = scale_of(e);
        for (int i = 0; i < 32; ++i) code[i] = code_of(x[i], d);
        store_mxfp4(code, e, group);
    });
    return true;
}

// The nearest values for ggml's exponent, the one above and the one below; of these three encodings of a block that with the
// least sum of importance * error^2 (float32, from the first number to the last), ggml's own if none is less.
bool encode_mxfp4_best(const Rows& rows) {
    bool sure = true;
    for_groups(rows, 32, 17, [&](const Group& group) {
        vf x[32], w[32];
        vi code[32], other[32];
        load_columns(group.values, 32, x);
        if (rows.importance) load_columns(group.importance, 32, w);
        const vf* const weights = rows.importance ? w : nullptr;
        const vf most = largest_of(x, 32);
        const vm empty = equal((vi)most, vi{});
        sure &= !any((vm)(negate(empty) & less((vi)most, splat(least_bits))));
        const vi own = exponent_of(most);
        vi e = own;
        vf least = codes_and_error(x, weights, scale_of(own), code);
        for (int step = 1; step >= -1; step -= 2) {
            const vi next = select(empty, own, own + step);
            const vf error = codes_and_error(x, weights, scale_of(next), other);
            const vm better = less(error, least);
            if (!any(better)) continue;
            least = select(better, error, least);
            e = select(better, next, e);
            for (int i = 0; i < 32; ++i) code[i] = select(better, other[i], code[i]);
        }
        store_mxfp4(code, e, group);
    });
    return sure;
}

// --- NVFP4 ---

namespace {

// ggml_fp32_to_ue4m3 and ggml_ue4m3_to_fp32 (half the value, as ggml has it) of numbers that are not negative.
LANE vi to_ue4m3(vf x) {
    x = select(greater(x, splat(448.0f)), splat(448.0f), x);
    const vi bits = (vi)x;
    const vi exponent = (bits >> 23) - 120;
    const vi tiny = lesser(truncate(x * 512.0f + 0.5f), splat(7));
    // A carry out of the mantissa raises the exponent. With an exponent of 15 there is 0x7E only.
    const vi rounded = (exponent << 3 | (bits >> 20 & 7)) + (bits >> 19 & 1);
    return select(greater(exponent, vi{}), select(less(rounded, splat(15 << 3)), rounded, splat(0x7E)), tiny);
}
LANE vf from_ue4m3(vi u) {
    const vi exponent = u >> 3, mantissa = u & 7;
    const vf tiny = to_float(mantissa) * 0x1.0p-10f;
    const vf other = (vf)((exponent + 119) << 23 | mantissa << 20);
    return select(equal(exponent, vi{}), tiny, other);
}

}  // namespace

bool encode_nvfp4(const Rows& rows) {
    bool sure = true;
    for_groups(rows, 64, 36, [&](const Group& group) {
        vi scale[4];
        for (int s = 0; s < 4; ++s) {
            vf x[16];
            vi code[16];
            load_values(group, 16 * s, 16, x);
            const vf most = largest_of(x, 16);
            // Far beyond the largest scale ggml's differences round to equals.
            sure &= !any(greater(most, splat(0x1.0p20f)));
            scale[s] = to_ue4m3(most / 6.0f);
            const vf d = from_ue4m3(scale[s]);
            const vm zero = equal(d, vf{});
            for (int i = 0; i < 16; ++i) code[i] = select(zero, vi{}, code_of(x[i], d));
            for (int i = 0; i < 8; i += 4) {
                vi pair[4];
                for (int b = 0; b < 4; ++b) pair[b] = code[i + b] | code[8 + i + b] << 4;
                store_words(word_of(pair), group.target, 4 + 8 * s + i);
            }
        }
        store_words(word_of(scale), group.target, 0);
    });
    return sure;
}

}  // namespace pgs::lanes::PGS_SET
