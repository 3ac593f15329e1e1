// The vector that every kernel is written with: PGS_WIDTH lanes of 32 bits. A kernel's source is compiled once for each set,
// with the set's name as PGS_SET and its instruction set as compiler options. Nothing from the C++ standard library may be
// used in here or in a kernel: a template or inline function compiled with those options could be the one that the linker
// keeps for all.
//
// Each lane does the operations of ggml's scalar code in their order, so the bytes are ggml's. That asks for care with
// comparisons (write them as ggml does, also for NaN), and forbids fused operations and another order of a sum.
#pragma once
#include <stdint.h>
#if defined(__x86_64__) && PGS_WIDTH > 1
#include <immintrin.h>
#elif defined(__aarch64__) && PGS_WIDTH > 1
#include <arm_neon.h>
#endif

#define LANE static inline __attribute__((always_inline))
#define LANE_MEMBER __attribute__((always_inline))

namespace pgs::lanes::PGS_SET {

constexpr int W = PGS_WIDTH;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

// Anywhere in memory. Not memcpy: GCC may move that in 16-byte pieces, and a wide load of them then waits.
typedef vf loose_vf __attribute__((aligned(1), may_alias));
typedef vi loose_vi __attribute__((aligned(1), may_alias));
typedef vu loose_vu __attribute__((aligned(1), may_alias));

LANE vf load(const void* p) { return *(const loose_vf*)p; }
LANE vi load_int(const void* p) { return *(const loose_vi*)p; }
LANE void store(void* p, vf v) { *(loose_vf*)p = v; }
LANE void store(void* p, vi v) { *(loose_vi*)p = v; }
LANE vf splat(float v) { return v - (vf){}; }
LANE vi splat(int32_t v) { return v - (vi){}; }

// Masks: a bit per lane where the machine has such registers, else a vector of 0 and -1. Combine them with & | ^ and
// negate(); never with arithmetic.
#if PGS_WIDTH == 16
typedef __mmask16 vm;
LANE vm less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
LANE vm less_equal(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
LANE vm equal(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
LANE vm less(vi a, vi b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
LANE vm equal(vi a, vi b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
LANE vm negate(vm m) { return (vm)~m; }
LANE bool any(vm m) { return m != 0; }
LANE bool all(vm m) { return m == 0xffff; }
LANE vf select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
LANE vi select(vm m, vi a, vi b) { return (vi)_mm512_mask_blend_epi32(m, (__m512i)b, (__m512i)a); }
LANE unsigned bits_of(vm m) { return m; }  // bit j: lane j
#else
typedef vi vm;
LANE vm less(vf a, vf b) { return a < b; }
LANE vm less_equal(vf a, vf b) { return a <= b; }
LANE vm equal(vf a, vf b) { return a == b; }
LANE vm less(vi a, vi b) { return a < b; }
LANE vm equal(vi a, vi b) { return a == b; }
LANE vm negate(vm m) { return ~m; }
LANE unsigned bits_of(vm m) {
#if PGS_WIDTH == 8
    return (unsigned)_mm256_movemask_ps((__m256)m);
#elif PGS_WIDTH == 4 && defined(__x86_64__)
    return (unsigned)_mm_movemask_ps((__m128)m);
#else
    unsigned bits = 0;
    for (int j = 0; j < W; ++j) bits |= (m[j] ? 1u : 0u) << j;
    return bits;
#endif
}
LANE bool any(vm m) {
#if defined(__aarch64__) && PGS_WIDTH > 1
    return vmaxvq_u32((uint32x4_t)m) != 0;
#else
    return bits_of(m) != 0;
#endif
}
LANE bool all(vm m) { return !any(~m); }
#if PGS_WIDTH == 8
LANE vf select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, (__m256)m); }
LANE vi select(vm m, vi a, vi b) { return (vi)_mm256_blendv_epi8((__m256i)b, (__m256i)a, (__m256i)m); }
#elif PGS_WIDTH == 4 && defined(__x86_64__)
LANE vf select(vm m, vf a, vf b) { return _mm_blendv_ps(b, a, (__m128)m); }
LANE vi select(vm m, vi a, vi b) { return (vi)_mm_blendv_epi8((__m128i)b, (__m128i)a, (__m128i)m); }
#else
LANE vf select(vm m, vf a, vf b) { return (vf)(((vi)a & m) | ((vi)b & ~m)); }
LANE vi select(vm m, vi a, vi b) { return (a & m) | (b & ~m); }
#endif
#endif
LANE vm greater(vf a, vf b) { return less(b, a); }
LANE vm greater_equal(vf a, vf b) { return less_equal(b, a); }
LANE vm greater(vi a, vi b) { return less(b, a); }

// (a < b ? a : b) and (a > b ? a : b), as ggml's MIN and MAX: with a NaN, b. That is what minps and maxps do.
#if PGS_WIDTH == 16
LANE vf lesser(vf a, vf b) { return _mm512_min_ps(a, b); }
LANE vf larger(vf a, vf b) { return _mm512_max_ps(a, b); }
LANE vi lesser(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
LANE vi larger(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#elif PGS_WIDTH == 8
LANE vf lesser(vf a, vf b) { return _mm256_min_ps(a, b); }
LANE vf larger(vf a, vf b) { return _mm256_max_ps(a, b); }
LANE vi lesser(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
LANE vi larger(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#elif PGS_WIDTH == 4 && defined(__x86_64__)
LANE vf lesser(vf a, vf b) { return _mm_min_ps(a, b); }
LANE vf larger(vf a, vf b) { return _mm_max_ps(a, b); }
LANE vi lesser(vi a, vi b) { return (vi)_mm_min_epi32((__m128i)a, (__m128i)b); }
LANE vi larger(vi a, vi b) { return (vi)_mm_max_epi32((__m128i)a, (__m128i)b); }
#else
LANE vf lesser(vf a, vf b) { return select(less(a, b), a, b); }
LANE vf larger(vf a, vf b) { return select(less(b, a), a, b); }
LANE vi lesser(vi a, vi b) { return select(less(a, b), a, b); }
LANE vi larger(vi a, vi b) { return select(less(b, a), a, b); }
#endif
LANE vi clamp(vi v, int lowest, int highest) { return lesser(larger(v, splat(lowest)), splat(highest)); }

LANE vf absolute(vf v) { return (vf)((vi)v & 0x7fffffff); }

constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
constexpr int32_t magic_bits = 0x4B400000;
constexpr float group_max_eps = 1e-15f;  // ggml's GROUP_MAX_EPS: what is below in all of a block is nothing

// ggml's nearest_int, also for values that are too large for it.
LANE vi nearest_int(vf v) { return ((vi)(v + magic) & 0x007fffff) - 0x00400000; }
LANE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
// A C cast of float to int as x86 does it: what does not fit is INT32_MIN.
LANE vi truncate(vf v) {
#if PGS_WIDTH == 16
    return (vi)_mm512_cvttps_epi32(v);
#elif PGS_WIDTH == 8
    return (vi)_mm256_cvttps_epi32(v);
#elif PGS_WIDTH == 4 && defined(__x86_64__)
    return (vi)_mm_cvttps_epi32(v);
#else
    const vm fits = less_equal(splat(-2147483648.f), v) & less(v, splat(2147483648.f));
    return select(fits, __builtin_convertvector(select(fits, v, vf{}), vi), splat((int32_t)0x80000000));
#endif
}
// roundf of |v| below 2^23, as the cast to int of it: halves away from zero.
LANE vi round_away(vf v) {
    const vi sign = (vi)v & (int32_t)0x80000000;
    return truncate(v + (vf)(sign | 0x3effffff));  // the float below 0.5
}
LANE vf square_root(vf v) {
#if PGS_WIDTH == 16
    return _mm512_sqrt_ps(v);
#elif PGS_WIDTH == 8
    return _mm256_sqrt_ps(v);
#elif PGS_WIDTH == 4 && defined(__x86_64__)
    return _mm_sqrt_ps(v);
#elif PGS_WIDTH == 4
    return vsqrtq_f32(v);
#else
    return vf{__builtin_sqrtf(v[0])};
#endif
}

LANE vf gather(const float* table, vi at) {
#if PGS_WIDTH == 16
    return _mm512_i32gather_ps((__m512i)at, table, 4);
#elif PGS_WIDTH == 8
    return _mm256_i32gather_ps(table, (__m256i)at, 4);
#else
    vf v;
    for (int j = 0; j < W; ++j) v[j] = table[at[j]];
    return v;
#endif
}
LANE vi gather(const int32_t* table, vi at) {
#if PGS_WIDTH == 16
    return (vi)_mm512_i32gather_epi32((__m512i)at, table, 4);
#elif PGS_WIDTH == 8
    return (vi)_mm256_i32gather_epi32(table, (__m256i)at, 4);
#else
    vi v;
    for (int j = 0; j < W; ++j) v[j] = table[at[j]];
    return v;
#endif
}

// GGML_FP16_TO_FP32 and GGML_FP32_TO_FP16 of halves in the low 16 bits of each lane.
LANE vf half_to_float(vu h) {
    const vu w = h << 16;
    const vu twice = w + w;
    const vf normal = (vf)((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const vf denormal = (vf)((twice >> 17) | (126u << 23)) - 0.5f;
    const vi small = twice < (1u << 27);
    return (vf)((w & 0x80000000u) | ((vu)small & (vu)denormal) | (~(vu)small & (vu)normal));
}
LANE vu float_to_half(vf f) {
    const vu w = (vu)f;
    const vu twice = w + w;
    vu bias = twice & 0xFF000000u;
    const vu low = (vu)(bias < 0x71000000u);
    bias = (bias & ~low) | (0x71000000u & low);
    const vf base = (vf)((bias >> 1) + 0x07800000u) + (absolute(f) * 0x1.0p+112f) * 0x1.0p-110f;
    const vu bits = (vu)base;
    const vu nonsign = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
    const vu nan = (vu)(twice > 0xFF000000u);
    return ((w & 0x80000000u) >> 16) | (nan & 0x7E00u) | (~nan & nonsign);
}

// Turns W vectors, each a stretch of one row, into W vectors, each a column.
LANE void transpose(vf* v) {
#if PGS_WIDTH == 16
    __m512 t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    __m512 u[16];
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 2; ++k) {
            const __m512d a = _mm512_castps_pd(t[4 * i + k]), b = _mm512_castps_pd(t[4 * i + 2 + k]);
            u[4 * i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[4 * i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int k = 0; k < 4; ++k) {
        const __m512 a = _mm512_shuffle_f32x4(u[k], u[4 + k], 0x88), b = _mm512_shuffle_f32x4(u[k], u[4 + k], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(u[8 + k], u[12 + k], 0x88),
                     d = _mm512_shuffle_f32x4(u[8 + k], u[12 + k], 0xdd);
        v[k] = _mm512_shuffle_f32x4(a, c, 0x88);
        v[8 + k] = _mm512_shuffle_f32x4(a, c, 0xdd);
        v[4 + k] = _mm512_shuffle_f32x4(b, d, 0x88);
        v[12 + k] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
#elif PGS_WIDTH == 8
    __m256 t[8], u[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 2; ++k) {
            u[4 * i + 2 * k] = _mm256_shuffle_ps(t[4 * i + k], t[4 * i + 2 + k], 0x44);
            u[4 * i + 2 * k + 1] = _mm256_shuffle_ps(t[4 * i + k], t[4 * i + 2 + k], 0xee);
        }
    for (int k = 0; k < 4; ++k) {
        v[k] = _mm256_permute2f128_ps(u[k], u[4 + k], 0x20);
        v[4 + k] = _mm256_permute2f128_ps(u[k], u[4 + k], 0x31);
    }
#elif PGS_WIDTH == 4
    const vf a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5), b = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
    const vf c = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5), d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
    v[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    v[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    v[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    v[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#else
    (void)v;
#endif
}

// columns[i] holds element i of each of W rows; n is a multiple of 16.
LANE void load_columns(const float* const* rows, int n, vf* columns) {
    for (int i = 0; i < n; i += W) {
        for (int j = 0; j < W; ++j) columns[i + j] = load(rows[j] + i);
        transpose(columns + i);
    }
}

// The largest magnitude of n numbers.
LANE vf largest_of(const vf* x, int n) {
    vf most = {};
    for (int i = 0; i < n; ++i) most = larger(most, absolute(x[i]));
    return most;
}

// Bytes as they lie in memory.
LANE vi word_of(vi a, vi b, vi c, vi d) { return a | b << 8 | c << 16 | d << 24; }
LANE vi word_of(const vi* bytes) { return word_of(bytes[0], bytes[1], bytes[2], bytes[3]); }

// Lane j's 4 or 2 bytes, or 1, to `at` bytes behind targets[j].
LANE void store_words(vi words, unsigned char* const* targets, int at) {
    int32_t w[W];
    store(w, words);
    for (int j = 0; j < W; ++j) __builtin_memcpy(targets[j] + at, &w[j], 4);
}
LANE void store_halves(vi halves, unsigned char* const* targets, int at) {
    int32_t w[W];
    store(w, halves);
    for (int j = 0; j < W; ++j) __builtin_memcpy(targets[j] + at, &w[j], 2);  // every machine of ours is little-endian
}
LANE void store_bytes(vi bytes, unsigned char* const* targets, int at) {
    int32_t w[W];
    store(w, bytes);
    for (int j = 0; j < W; ++j) targets[j][at] = (unsigned char)w[j];
}

}  // namespace pgs::lanes::PGS_SET
