// Conversions without a search: float32 to and from F16 and BF16, and the decoders of types that people quantize from.
// Lanes are consecutive numbers.
#include "quant/lanes/blocks.hpp"

namespace pgs::lanes::PGS_SET {

namespace {

typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef uint8_t vub __attribute__((vector_size(W)));
typedef vh loose_vh __attribute__((aligned(1), may_alias));
typedef vb loose_vb __attribute__((aligned(1), may_alias));
typedef vub loose_vub __attribute__((aligned(1), may_alias));
typedef int32_t loose_int __attribute__((aligned(1), may_alias));

LANE vu load_halves(const void* p) { return __builtin_convertvector(*(const loose_vh*)p, vu); }
#if PGS_WIDTH == 16
LANE vi load_signed(const void* p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u*)p)); }
LANE vi load_bytes(const void* p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i_u*)p)); }
#elif PGS_WIDTH == 8
LANE vi load_signed(const void* p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i_u*)p)); }
LANE vi load_bytes(const void* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i_u*)p)); }
#elif PGS_WIDTH == 4 && defined(__x86_64__)
LANE vi load_signed(const void* p) { return (vi)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(*(const loose_int*)p)); }
LANE vi load_bytes(const void* p) { return (vi)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(*(const loose_int*)p)); }
#else
LANE vi load_signed(const void* p) { return __builtin_convertvector(*(const loose_vb*)p, vi); }
LANE vi load_bytes(const void* p) { return __builtin_convertvector(*(const loose_vub*)p, vi); }
#endif

LANE vf wide(const unsigned char* p) {
#if PGS_WIDTH == 16
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u*)p));
#elif PGS_WIDTH == 8
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u*)p));
#else
    return half_to_float(load_halves(p));
#endif
}

LANE void narrow(vf v, unsigned char* p) {
#if PGS_WIDTH == 16
    _mm256_storeu_si256((__m256i_u*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif PGS_WIDTH == 8
    _mm_storeu_si128((__m128i_u*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    *(loose_vh*)p = __builtin_convertvector(float_to_half(v), vh);
#endif
}

LANE void narrow_brain(vf v, unsigned char* p) {
    const vu bits = (vu)v;
    *(loose_vh*)p = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, vh);
}

// One half of a block's header.
LANE float half_at(const unsigned char* p) {
    uint16_t h;
    __builtin_memcpy(&h, p, 2);
#if PGS_WIDTH >= 8
    return _cvtsh_ss(h);
#else
    const uint32_t twice = (uint32_t)h << 17,
                   bits = twice < 1u << 27 ? twice >> 17 | 126u << 23 : (twice >> 4) + (0xE0u << 23);
    float v;
    __builtin_memcpy(&v, &bits, sizeof v);
    v = twice < 1u << 27 ? v - 0.5f : v * 0x1.0p-112f;
    return h >> 15 ? -v : v;
#endif
}

// work(vector) at all places; the last one may be partly beyond `elements`, in a copy.
template <class Work>
LANE void for_elements(const float* source, unsigned char* target, uint64_t elements, Work work) {
    uint64_t i = 0;
    for (; i + W <= elements; i += W) work(load(source + i), target + 2 * i);
    if (i == elements) return;
    float rest[W] = {};
    unsigned char out[2 * W];
    __builtin_memcpy(rest, source + i, (elements - i) * 4);
    work(load(rest), out);
    __builtin_memcpy(target + 2 * i, out, (elements - i) * 2);
}

template <class Work>
LANE void for_halves(const unsigned char* source, float* target, uint64_t elements, Work work) {
    uint64_t i = 0;
    for (; i + W <= elements; i += W) store(target + i, work(source + 2 * i));
    if (i == elements) return;
    unsigned char rest[2 * W] = {};
    float out[W];
    __builtin_memcpy(rest, source + 2 * i, (elements - i) * 2);
    store(out, work(rest));
    __builtin_memcpy(target + i, out, (elements - i) * 4);
}

}  // namespace

uint32_t largest(const float* values, uint64_t elements) {
    vi most[4] = {};
    uint64_t i = 0;
    for (; i + 4 * W <= elements; i += 4 * W)
        for (int k = 0; k < 4; ++k) most[k] = larger(most[k], load_int(values + i + k * W) & 0x7fffffff);
    most[0] = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    int32_t best = 0;
    for (int j = 0; j < W; ++j) best = most[0][j] > best ? most[0][j] : best;
    for (; i < elements; ++i) {
        int32_t bits;
        __builtin_memcpy(&bits, values + i, sizeof bits);
        bits &= 0x7fffffff;
        best = bits > best ? bits : best;
    }
    return (uint32_t)best;
}

bool encode_f16(const Rows& rows) {
    for_elements(rows.values, rows.target, rows.rows * rows.row_elements,
                 [](vf v, unsigned char* p) __attribute__((always_inline)) { narrow(v, p); });
    return true;
}

bool encode_bf16(const Rows& rows) {
    for_elements(rows.values, rows.target, rows.rows * rows.row_elements,
                 [](vf v, unsigned char* p) __attribute__((always_inline)) { narrow_brain(v, p); });
    return true;
}

void decode_f16(const unsigned char* source, float* target, uint64_t elements) {
    for_halves(source, target, elements, [](const unsigned char* p) __attribute__((always_inline)) { return wide(p); });
}

void decode_bf16(const unsigned char* source, float* target, uint64_t elements) {
    for_halves(source, target, elements,
               [](const unsigned char* p) __attribute__((always_inline)) { return (vf)(load_halves(p) << 16); });
}

void decode_q8_0(const unsigned char* source, float* target, uint64_t elements) {
    for (; elements; elements -= 32, source += 34, target += 32) {
        const vf d = splat(half_at(source));
        for (int i = 0; i < 32; i += W) store(target + i, to_float(load_signed(source + 2 + i)) * d);
    }
}

void decode_mxfp4(const unsigned char* source, float* target, uint64_t elements) {
    for (; elements; elements -= 32, source += 17, target += 32) {
        const uint32_t e = source[0];
        const vf d = (vf)(vu{} + (e < 2 ? 0x00200000u << e : (e - 1) << 23));
        auto values = [&](vi code) __attribute__((always_inline)) {
            const vi m = code & 7;
            const vi q = m + larger(m - 4, vi{}) + (m >> 1 & m >> 2 & m & 1) * 2;  // 0 1 2 3 4 6 8 12
            const vi sign = -(code >> 3 & 1);
            return to_float((q ^ sign) - sign) * d;
        };
        for (int i = 0; i < 16; i += W) {
            const vi both = load_bytes(source + 1 + i);
            store(target + i, values(both & 15));
            store(target + 16 + i, values(both >> 4));
        }
    }
}

void decode_q4_k(const unsigned char* source, float* target, uint64_t elements) {
    for (; elements; elements -= 256, source += 144, target += 256) {
        const float d = half_at(source), least = half_at(source + 2);
        const unsigned char* s = source + 4;
        for (int j = 0; j < 8; ++j) {
            const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
            const int minimum = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
            const vf dj = splat(d * (float)scale), mj = splat(least * (float)minimum);
            for (int i = 0; i < 32; i += W) {
                const vi q = load_bytes(source + 16 + 32 * (j / 2) + i) >> 4 * (j % 2) & 15;
                store(target + 32 * j + i, dj * to_float(q) - mj);
            }
        }
    }
}

void decode_q6_k(const unsigned char* source, float* target, uint64_t elements) {
    for (; elements; elements -= 256, source += 210, target += 256) {
        const float d = half_at(source + 208);
        for (int j = 0; j < 16; ++j) {  // 16 numbers each
            const int h = j / 8, row = j % 8 / 2, at = j % 2 * 16;
            const unsigned char* low = source + 64 * h + 32 * (row % 2) + at;
            const unsigned char* high = source + 128 + 32 * h + at;
            const vf dj = splat(d * (float)(int8_t)source[192 + j]);
            for (int i = 0; i < 16; i += W) {
                const vi q = (load_bytes(low + i) >> 4 * (row / 2) & 15) | (load_bytes(high + i) >> 2 * row & 3) << 4;
                store(target + 16 * j + i, dj * to_float(q - 32));
            }
        }
    }
}

}  // namespace pgs::lanes::PGS_SET
