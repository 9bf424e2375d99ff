// Shared by all native kernels: portable vectors of one register, number formats, exp.
//
// GCC's vector extension lowers vectors to whatever -march=native offers, so one source serves every
// CPU. They are as wide as a register of AVX-512, or else of AVX2: of wider ones GCC compares and
// converts element by element. Only what it lowers badly is told by intrinsics. Plain C ABI: raw pointers and
// integers, no PyTorch headers.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

enum DType { F32 = 0, BF16 = 1, F16 = 2 };

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class To, class From>
static inline To bit_copy(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

static inline vf splat(float x) { return x - vf{}; }

typedef vf loose_vf __attribute__((aligned(4), may_alias));
static inline vf load(const float* p) { return *(const loose_vf*)p; }
static inline void store(float* p, vf v) { *(loose_vf*)p = v; }

static inline vf load(const bf16* p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return bit_copy<vf>(__builtin_convertvector(h, vu) << 16);
}
// Round to nearest even; a NaN stays a NaN.
static inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh(bit_copy<__m512>(v));
    memcpy(p, &h, sizeof h);
#else
    vu b = bit_copy<vu>(v);
    vu rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    vu quiet = (b >> 16) | 0x40u;
    vi nan = v != v;
    vu r = (rounded & ~bit_copy<vu>(nan)) | (quiet & bit_copy<vu>(nan));
    vh h = __builtin_convertvector(r, vh);
    memcpy(p, &h, sizeof h);
#endif
}

// _Float16 is younger than many installed compilers, hence by hand (F. Giesen's conversions).
static inline float half_to_float(uint16_t half) {
    uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
    uint32_t bits = rest >= 0x7c00u ? 0x7f800000u | (rest & 0x3ffu) << 13
                                    : bit_copy<uint32_t>(bit_copy<float>(rest << 13) * 0x1p112f);
    return bit_copy<float>(bits | sign);
}
static inline uint16_t float_to_half(float x) {
    uint32_t bits = bit_copy<uint32_t>(x), rest = bits & 0x7fffffffu;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    if (rest >= 0x47800000u) return sign | (rest > 0x7f800000u ? 0x7e00u : 0x7c00u);
    if (rest < 0x38800000u)
        return sign | (uint16_t)(bit_copy<uint32_t>(bit_copy<float>(rest) + 0.5f) - 0x3f000000u);
    return sign | (uint16_t)((rest + 0xc8000fffu + (rest >> 13 & 1u)) >> 13);
}

static inline vf load(const f16* p) {
#if defined(__AVX512F__)
    return bit_copy<vf>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__F16C__)
    return bit_copy<vf>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
    float lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = half_to_float(p[i].bits);
    return load(lanes);
#endif
}
static inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
    __m256i h = _mm512_cvtps_ph(bit_copy<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256((__m256i*)p, h);
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(bit_copy<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    float lanes[LANES];
    store(lanes, v);
    for (int i = 0; i < LANES; i++) p[i].bits = float_to_half(lanes[i]);
#endif
}

static inline float to_float(float x) { return x; }
static inline float to_float(f16 x) { return half_to_float(x.bits); }
static inline float to_float(bf16 x) { return bit_copy<float>((uint32_t)x.bits << 16); }
static inline void from_float(float* p, float x) { *p = x; }
static inline void from_float(f16* p, float x) { p->bits = float_to_half(x); }
static inline void from_float(bf16* p, float x) {
    uint32_t b = bit_copy<uint32_t>(x);
    p->bits = x != x ? (uint16_t)((b >> 16) | 0x40u)
                     : (uint16_t)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

static inline vf select(vi mask, vf yes, vf no) {
    return bit_copy<vf>((bit_copy<vi>(yes) & mask) | (bit_copy<vi>(no) & ~mask));
}
static inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
    return bit_copy<vf>(_mm512_max_ps(bit_copy<__m512>(a), bit_copy<__m512>(b)));
#elif defined(__AVX__)
    return bit_copy<vf>(_mm256_max_ps(bit_copy<__m256>(a), bit_copy<__m256>(b)));
#else
    return select(a > b, a, b);
#endif
}

static inline float reduce_add(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(bit_copy<__m512>(v));
#else
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
#endif
}
static inline float reduce_max(vf v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    float best = lanes[0];
    for (int i = 1; i < LANES; i++) best = lanes[i] > best ? lanes[i] : best;
    return best;
}

// exp by range reduction to [-ln2/2, ln2/2] and Cephes' polynomial (expf.c); relative error about
// 1e-7. Below -87.3 the result is 0; above 88.7 it is infinite, in the general form from 88.4 on.
static inline vf vexp(vf x) {
#if defined(__AVX512F__)
    __mmask16 kept = _mm512_cmp_ps_mask(bit_copy<__m512>(x), _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
    x = bit_copy<vf>(_mm512_min_ps(_mm512_set1_ps(89.0f), bit_copy<__m512>(x)));
#else
    vi zero = x < splat(-87.3f);
    x = select(x > splat(88.7f), splat(88.7f), x);
    x = select(zero, splat(0.0f), x);
#endif
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    vf n = (x * 1.44269504088896341f + magic) - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
    return bit_copy<vf>(_mm512_maskz_scalef_ps(kept, bit_copy<__m512>(p), bit_copy<__m512>(n)));
#else
    vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
    return select(zero, splat(0.0f), p * bit_copy<vf>(scale));
#endif
}

// tanh with an absolute error of about 1e-7: close to 0 that is not relative, which nobody needs.
static inline vf vtanh(vf x) {
    vf e = vexp(-2.0f * vmax(x, -x));
    vf t = (1.0f - e) / (1.0f + e);
    return select(x < splat(0.0f), -t, t);
}
