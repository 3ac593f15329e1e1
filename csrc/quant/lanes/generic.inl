// The kernels, generic over the width W of a vector: included by lanes/*.cpp inside a namespace and a target region, so
// nothing from the standard library may be used here (a template instantiated under -mavx2 could be the one the linker keeps
// for all). Each lane holds one element and does ggml's scalar operations on it, so the bytes are ggml's.

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

// Vectors anywhere in memory. Not memcpy: GCC may move that in 16-byte pieces, and a wide load of them then waits.
typedef vi loose_vi __attribute__((aligned(1), may_alias));
typedef vu loose_vu __attribute__((aligned(1), may_alias));
typedef vh loose_vh __attribute__((aligned(1), may_alias));

typedef int32_t v4 __attribute__((vector_size(16)));
typedef uint16_t v8 __attribute__((vector_size(16)));
typedef uint8_t v16 __attribute__((vector_size(16)));

// The low byte of each of 16 integers: every second half of them, then every second byte of those.
static inline void store_low_bytes(unsigned char* target, const vi* integers) {
    v8 quarter[4];
    __builtin_memcpy(quarter, integers, sizeof quarter);
    const v16 low = (v16)__builtin_shufflevector(quarter[0], quarter[1], 0, 2, 4, 6, 8, 10, 12, 14);
    const v16 high = (v16)__builtin_shufflevector(quarter[2], quarter[3], 0, 2, 4, 6, 8, 10, 12, 14);
    const v16 bytes = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    __builtin_memcpy(target, &bytes, sizeof bytes);
}

// ggml_compute_fp16_to_fp32, branch-free.
static inline vu half_to_float_bits(vu h) {
    const vu w = h << 16;
    const vu twice = w + w;
    const vf normal = (vf)((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const vf denormal = (vf)((twice >> 17) | (126u << 23)) - 0.5f;
    return (w & 0x80000000u) | (twice < (1u << 27) ? (vu)denormal : (vu)normal);
}

static void decode_f16(const uint16_t* source, float* target, uint64_t elements) {
    uint64_t i = 0;
    for (; i + W <= elements; i += W) {
        const vh h = *(const loose_vh*)(source + i);
        *(loose_vu*)(target + i) = half_to_float_bits(__builtin_convertvector(h, vu));
    }
    for (; i < elements; ++i) {
        vu h = {};
        h[0] = source[i];
        const vu bits = half_to_float_bits(h);
        __builtin_memcpy(target + i, &bits, sizeof(float));
    }
}

static bool all_finite(const float* source, uint64_t elements) {
    vi bad = {};
    uint64_t i = 0;
    for (; i + W <= elements; i += W) {
        const vi bits = *(const loose_vi*)(source + i);
        bad |= (bits & 0x7f800000) == 0x7f800000;
    }
    for (; i < elements; ++i) {
        int32_t bits;
        __builtin_memcpy(&bits, source + i, sizeof bits);
        bad[0] |= (bits & 0x7f800000) == 0x7f800000;
    }
    int32_t any = 0;
    for (int j = 0; j < W; ++j) any |= bad[j];
    return any == 0;
}

// Just below a power of two log2f rounds up to it, so that floorf(log2f(x)) is one too large. How many of the largest
// mantissas of an exponent that takes: the spacing of floats just below |log2 x| in [2^k, 2^(k+1)) is 2^(k-23), a step of the
// mantissa changes log2 x by 2^-24 / ln 2, so floor(ln 2 * 2^k) of them round up. tests/test_quant.py compares all of them
// with ggml.
static uint32_t rounded_up(uint32_t exponent) {
    static const uint32_t count[7] = {0, 1, 2, 5, 11, 22, 44};
    const int power = (int)exponent - 126;  // log2 of the power of two above
    const uint32_t below = power > 0 ? (uint32_t)power - 1 : (uint32_t)-power;  // |log2 x| just below it, rounded down
    return below == 0 ? 0 : count[31 - __builtin_clz(below)];
}

// ggml's quantize_row_mxfp4_ref. Its linear search for the nearest of 0, 1, 2, 3, 4, 6, 8, 12 (times d, and their
// negatives), first wins, is the number of midpoints that |x| exceeds: d is a power of two, so the products are exact, and
// the differences that decide are exact by Sterbenz's lemma; at a midpoint the smaller magnitude comes first.
static bool encode_mxfp4(const float* source, unsigned char* target, uint64_t elements) {
    for (uint64_t block = 0; block < elements / 32; ++block, source += 32, target += 17) {
        vi bits[32 / W], most = {};
        for (int v = 0; v < 32 / W; ++v) {
            bits[v] = *(const loose_vi*)(source + v * W);
            const vi m = bits[v] & 0x7fffffff;  // ordered as the floats are
            most = m > most ? m : most;
        }
        v4 quarter[W / 4];
        *(loose_vi*)quarter = most;
        for (int v = 1; v < W / 4; ++v) quarter[0] = quarter[v] > quarter[0] ? quarter[v] : quarter[0];
        int32_t largest = 0;
        for (int j = 0; j < 4; ++j) largest = quarter[0][j] > largest ? quarter[0][j] : largest;
        uint32_t e = 0;
        if (largest != 0) {
            const uint32_t exponent = (uint32_t)largest >> 23;
            if (exponent == 0) return false;
            const uint32_t up = ((uint32_t)largest & 0x7fffffu) > 0x7fffffu - rounded_up(exponent) ? 1 : 0;
            if (exponent + up == 255) return false;  // 12 d overflows
            e = (exponent + up - 2) & 0xff;  // floor(log2) - 2 + 127, wrapping as x86 does
        }
        const uint32_t d_bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
        float d;
        __builtin_memcpy(&d, &d_bits, sizeof d);
        vi code[32 / W];
        for (int v = 0; v < 32 / W; ++v) {
            const vf a = (vf)(bits[v] & 0x7fffffff);
            const vi some = a > 0.5f * d;  // comparisons give -1
            const vi m = some + (a > 1.5f * d) + (a > 2.5f * d) + (a > 3.5f * d) + (a > 5 * d) + (a > 7 * d) + (a > 10 * d);
            code[v] = -m | ((vi)((vu)bits[v] >> 31 << 3) & some);
        }
        target[0] = (unsigned char)e;
        vi pairs[16 / W];
        for (int v = 0; v < 16 / W; ++v) pairs[v] = code[v] | code[v + 16 / W] << 4;
        store_low_bytes(target + 1, pairs);
    }
    return true;
}

#undef W
