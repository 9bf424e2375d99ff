// Elements of quantized KV caches: int8 and FP8 e4m3, each times a float32 scale of its head and
// token. Both are exact in bf16, so tiles take them as they are and the scales come in float32.
#pragma once
#include "common.h"

struct i8 {
    int8_t bits;
};
struct e4m3 {
    uint8_t bits;
};
enum CacheType { I8 = 3, E4M3 = 4 };  // beside DType's

typedef int8_t vb __attribute__((vector_size(LANES)));
typedef uint8_t vub __attribute__((vector_size(LANES)));

static inline vf load(const i8* p) {
    vb b;
    memcpy(&b, p, sizeof b);
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m256i wide = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bit_copy<int64_t>(b)));
    return bit_copy<vf>(_mm256_cvtepi32_ps(wide));
#else
    return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}
// The bits as a float's, whose exponent is biased by 127 instead of 7. A NaN reads as 480: the
// quantizer writes none, and what it makes of a NaN has a scale of NaN.
static inline vf load(const e4m3* p) {
    vub b;
    memcpy(&b, p, sizeof b);
#if defined(__AVX2__) && !defined(__AVX512F__)
    vu wide = bit_copy<vu>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_copy<int64_t>(b))));
#else
    vu wide = __builtin_convertvector(b, vu);
#endif
    return bit_copy<vf>((wide & 0x7fu) << 20 | (wide & 0x80u) << 24) * 0x1p120f;
}

// Round to nearest even; the quantizer's values are at most 127 in magnitude.
static inline void store(i8* p, vf v) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    vb b = __builtin_convertvector(__builtin_convertvector((v + magic) - magic, vi), vb);
    memcpy(p, &b, sizeof b);
}
// Round to nearest even; the quantizer's values are at most 448 in magnitude.
static inline void store(e4m3* p, vf v) {
    vu bits = bit_copy<vu>(v), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    vu normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    // At 2^14 a float's last bit weighs 2^-9, as the last bit of a subnormal e4m3.
    vu subnormal = bit_copy<vu>(bit_copy<vf>(magnitude) + 0x1p14f) - (141u << 23);
    vu small = bit_copy<vu>(magnitude < (121u << 23));
    vub b = __builtin_convertvector((small & subnormal) | (~small & normal) | sign, vub);
    memcpy(p, &b, sizeof b);
}

static inline float largest_of(i8) { return 127.0f; }
static inline float largest_of(e4m3) { return 448.0f; }

// The definition is kernels.layer_cache.quantize_heads; bit for bit the same.
template <class T, class C>
static inline float quantize_head(const T* x, C* to, int64_t dh) {
    vf top = splat(0.0f);
    for (int64_t i = 0; i < dh; i += LANES) {
        vf v = load(x + i);
        vf magnitude = vmax(v, -v);
        // A NaN is larger than anything, and stays.
        top = select(magnitude > top | magnitude != magnitude, magnitude, top);
    }
    float lanes[LANES], largest = 0.0f;
    store(lanes, top);
    for (int i = 0; i < LANES && largest == largest; i++)
        if (!(lanes[i] <= largest)) largest = lanes[i];
    // Below this the inverse is infinite.
    if (largest < 0x1p-119f) {
        memset(to, 0, dh);
        return 0.0f;
    }
    float inverse = largest_of(C{}) / largest;
    for (int64_t i = 0; i < dh; i += LANES) {
        vf scaled = load(x + i) * inverse;
        asm("" : "+m"(scaled));  // or a fused multiply-add would skip the product's own rounding
        store(to + i, scaled);
    }
    return largest / largest_of(C{});
}
