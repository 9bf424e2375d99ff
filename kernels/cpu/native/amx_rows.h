// Rows of activations as tiles: bf16, or rounded by the row's own maximum to int8 or FP8 e4m3.
//
// A packed row is [step][64 bytes], 1024 bytes between steps because 16 rows interleave; it is zero
// beyond K. What is rounded depends on the row alone.
#pragma once
#include <cmath>
#include "amx_tiles.h"

#if AMX_KERNELS
enum RowKind { ROW_BF16 = 0, ROW_INT8 = 1, ROW_FP8 = 2, ROW_FP8_STATIC = 3 };
constexpr float FP8_MAX = 448.0f;
constexpr float SMALLEST_MAXIMUM = 1e-30f;  // so that no scale of FP8 is 0

struct Outlier {
    int32_t k;
    float value;
};

// LANES elements from `at`, zero beyond k.
template <class T>
static inline __attribute__((always_inline)) vf load_within(const T* x, int64_t at, int64_t k) {
    if (at + LANES <= k) return load(x + at);
    float lanes[LANES];
    for (int64_t l = 0; l < LANES; l++) lanes[l] = at + l < k ? to_float(x[at + l]) : 0.0f;
    return load(lanes);
}

static inline vf magnitude(vf v) { return bit_copy<vf>(bit_copy<vi>(v) & 0x7fffffff); }

static inline vf max_of(vf a, vf b) {
    return bit_copy<vf>(_mm512_max_ps(bit_copy<__m512>(a), bit_copy<__m512>(b)));
}

template <class T>
static float largest_magnitude(const T* x, int64_t begin, int64_t end) {
    vf best = splat(0.0f), other = splat(0.0f);
    int64_t i = begin;
    for (; i + 2 * LANES <= end; i += 2 * LANES) {
        best = max_of(best, magnitude(load(x + i)));
        other = max_of(other, magnitude(load(x + i + LANES)));
    }
    for (; i < end; i += LANES) best = max_of(best, magnitude(load_within(x, i, end)));
    return reduce_max(max_of(best, other));
}

template <class T>
static void pack_row_bf16(const T* x, int64_t k, char* tile_row, int64_t steps) {
    for (int64_t s = 0; s < steps; s++) {
        bf16* to = (bf16*)(tile_row + s * 1024);
        int64_t base = s * 32, left = k - base < 32 ? k - base : 32;
        if (left == 32) {
            store(to, load(x + base));
            store(to + LANES, load(x + base + LANES));
        } else {
            for (int64_t i = 0; i < 32; i++) from_float(to + i, i < left ? to_float(x[base + i]) : 0.0f);
        }
    }
}

// Symmetric int8 by the largest of the elements below `threshold`; the others become 0 and are
// counted. Returns the row's scale.
template <class T>
static float pack_row_int8(const T* x, int64_t k, char* tile_row, int64_t steps, float threshold,
                           int64_t* outliers) {
    vf best = splat(0.0f);
    vi below = {};
    for (int64_t i = 0; i < k; i += LANES) {
        vf size = magnitude(load_within(x, i, k));
        vi kept = size < threshold;
        below += kept;
        best = vmax(best, select(kept, size, splat(0.0f)));
    }
    *outliers = (k + LANES - 1) / LANES * LANES + _mm512_reduce_add_epi32(bit_copy<__m512i>(below));
    float largest = reduce_max(best);
    float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    for (int64_t s = 0; s < steps; s++) {
        char* to = tile_row + s * 1024;
        for (int64_t j = 0; j < 64; j += LANES) {
            vf v = load_within(x, s * 64 + j, k);
            v = select(magnitude(v) < threshold, v, splat(0.0f));
            __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(bit_copy<__m512>(v * inverse)));
            memcpy(to + j, &bytes, sizeof bytes);
        }
    }
    return largest / 127.0f;
}

template <class T>
static void list_outliers(const T* x, int64_t k, float threshold, Outlier* to) {
    for (int64_t i = 0; i < k; i += LANES) {
        vf v = load_within(x, i, k);
        __m512 size = bit_copy<__m512>(magnitude(v));
        __mmask16 found = _mm512_cmp_ps_mask(size, _mm512_set1_ps(threshold), _CMP_NLT_UQ);
        for (uint32_t left = found; left; left &= left - 1) {
            int64_t at = i + __builtin_ctz(left);
            *to++ = {(int32_t)at, to_float(x[at])};
        }
    }
}

// To the nearest e4m3 (three bits of fraction, steps of 2^-9 below 2^-6), ties to even, saturating:
// adding 1.5 * 2^20 times the power of two below v leaves just that many bits.
static inline __attribute__((always_inline)) vf round_e4m3(vf v) {
    __m512 x = bit_copy<__m512>(v);
    x = _mm512_max_ps(_mm512_set1_ps(-FP8_MAX), _mm512_min_ps(_mm512_set1_ps(FP8_MAX), x));
    __m512i power = _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7f800000));
    power = _mm512_max_epi32(power, _mm512_set1_epi32((127 - 6) << 23));
    __m512 magic = (__m512)_mm512_add_epi32(power, _mm512_set1_epi32((20 << 23) | 0x400000));
    return bit_copy<vf>(_mm512_sub_ps(_mm512_add_ps(x, magic), magic));
}

// FP8 by the maximum of the row; e4m3 is exact in bf16, so the row's scale is left to the output
// and returned. By blocks of columns instead where `block` (a multiple of 32) is not 0: then the
// scales are multiplied in, and 1 is returned.
template <class T>
static float pack_row_fp8(const T* x, int64_t k, char* tile_row, int64_t block) {
    float scale = 1.0f;
    int64_t width = block ? block : k;
    for (int64_t begin = 0; begin < k; begin += width) {
        int64_t end = begin + width < k ? begin + width : k;
        float largest = fmaxf(largest_magnitude(x, begin, end), SMALLEST_MAXIMUM);
        float inverse = FP8_MAX / largest;
        scale = largest / FP8_MAX;
        for (int64_t i = begin; i < (end + 31) / 32 * 32; i += LANES) {
            vf v = round_e4m3(load_within(x, i, end) * inverse);
            store((bf16*)(tile_row + i / 32 * 1024) + i % 32, block ? v * scale : v);
        }
    }
    return block ? 1.0f : scale;
}

template <class T>
static float pack_row_fp8_static(const T* x, int64_t k, char* tile_row, float scale) {
    for (int64_t i = 0; i < (k + 31) / 32 * 32; i += LANES)
        store((bf16*)(tile_row + i / 32 * 1024) + i % 32, round_e4m3(load_within(x, i, k) / scale));
    return scale;
}
#endif
