// Quantized panels made bf16 tiles, one step (32 positions of K, 32 columns) at a time.
//
// Nibbles: 2 x 256 bytes a step; a dword holds those of 8 half rows. Bytes: 2 x [16 rows][16
// columns][2 of K]. Scales and zeros are [panels, groups, 32]; FP8 without groups is exact in bf16
// and leaves its scales to the output.
#pragma once
#include "amx_tiles.h"

#if AMX_KERNELS
enum Kind { DENSE = 0, INT8 = 1, INT4 = 2, TABLE4 = 3, INT8_GROUPS = 4, FP8 = 5, FP8_GROUPS = 6 };

// As Python's `_AmxWeight` describes it.
struct Weight {
    const char* data;
    const char* scales;  // INT8, FP8: float32 [n]; groups: [panels, groups, 32]
    const char* zeros;   // INT4, INT8_GROUPS: [panels, groups, 32], or [32] for all
    const float* table;  // TABLE4: [16]
    const float* bias;   // [n] or null
    int64_t n, k, group_size;
    int32_t kind, scales_dtype, zeros_dtype, zeros_shared;
};

constexpr bool widens(int kind) { return kind >= INT4; }
constexpr bool in_nibbles(int kind) { return kind == INT4 || kind == TABLE4; }
constexpr bool in_groups(int kind) { return widens(kind) && kind != FP8; }
constexpr int64_t source_step_bytes(int kind) {
    return in_nibbles(kind) ? 512 : widens(kind) ? 1024 : 2048;
}

static inline __m512 load_as(const char* values, int dtype, int64_t at) {
    return bit_copy<__m512>(dtype == F16 ? load((const f16*)values + at)
                                         : load((const float*)values + at));
}

// 32 e4m3 bytes -> bf16, all 256 codes: shifted into place, but for zeros, subnormals and NaN.
struct E4m3 {
    __m512i small;

    E4m3() {
        alignas(64) uint16_t table[32] = {};
        for (int i = 1; i < 8; i++) table[i] = bit_copy<uint32_t>(i * 0x1p-9f) >> 16;
        table[127 % 32] = 0x7fc0;
        small = _mm512_load_si512(table);
    }
    __attribute__((always_inline)) __m512i widen(const char* from) const {
        __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
        __m512i low = _mm512_set1_epi16(0x7f), rest = _mm512_and_si512(code, low);
        __m512i next = _mm512_and_si512(_mm512_add_epi16(code, _mm512_set1_epi16(1)), low);
        __mmask32 special = _mm512_cmple_epu16_mask(next, _mm512_set1_epi16(8));
        __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(rest, 4), _mm512_set1_epi16(120 << 7));
        bits = _mm512_mask_permutexvar_epi16(bits, special, rest, small);
        __m512i sign = _mm512_slli_epi16(code, 8);
        // bits | (sign & 0x8000)
        return _mm512_ternarylogic_epi32(bits, sign, _mm512_set1_epi16((short)0x8000), 0xf8);
    }
};

template <int KIND>
struct Widener {
    __m512 scale[4], offset[4];
    __m512 table;
    __m512i spread;
    E4m3 e4m3;

    explicit Widener(const Weight& w) {
        table = KIND == TABLE4 ? _mm512_loadu_ps(w.table)
                               : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        spread = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    }
    // Take up the scales and zeros of one group of one panel, from position `at` on.
    void group(const Weight& w, int64_t at) {
        __m512i high = _mm512_add_epi32(spread, _mm512_set1_epi32(8));
        for (int t = 0; t < 2; t++) {
            __m512 s = load_as(w.scales, w.scales_dtype, at + t * 16);
            scale[t * 2] = _mm512_permutexvar_ps(spread, s);
            scale[t * 2 + 1] = _mm512_permutexvar_ps(high, s);
            if (KIND != INT4 && KIND != INT8_GROUPS) continue;
            __m512 z = load_as(w.zeros, w.zeros_dtype, w.zeros_shared ? t * 16 : at + t * 16);
            __m512 o = _mm512_mul_ps(s, _mm512_sub_ps(_mm512_setzero_ps(), z));
            offset[t * 2] = _mm512_permutexvar_ps(spread, o);
            offset[t * 2 + 1] = _mm512_permutexvar_ps(high, o);
        }
    }
    __attribute__((always_inline)) __m512 scaled(__m512 v, int half) const {
        if (KIND == INT4 || KIND == INT8_GROUPS) return _mm512_fmadd_ps(v, scale[half], offset[half]);
        return _mm512_mul_ps(v, scale[half]);
    }
    static __attribute__((always_inline)) void put(char* row, __m512 lo, __m512 hi) {
        _mm512_store_si512(row, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
    }
    __attribute__((always_inline)) void nibbles(const char* packed, char* tiles) const {
        for (int t = 0; t < 2; t++)
            for (int v = 0; v < 4; v++) {
                __m512i q = _mm512_loadu_si512(packed + t * 256 + v * 64);
                char* rows = tiles + t * 1024 + v * 256;
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    __m512 lo = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 8 * j), table);
                    __m512 hi = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 8 * j + 4), table);
                    put(rows + j * 64, scaled(lo, t * 2), scaled(hi, t * 2 + 1));
                }
            }
    }
    __attribute__((always_inline)) void bytes(const char* packed, char* tiles) const {
        for (int t = 0; t < 2; t++)
#pragma GCC unroll 4
            for (int r = 0; r < 16; r++) {
                const char* from = packed + t * 512 + r * 32;
                char* row = tiles + t * 1024 + r * 64;
                if (KIND == INT8_GROUPS) {
                    __m512i lo = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
                    __m512i hi = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + 16)));
                    put(row, scaled(_mm512_cvtepi32_ps(lo), t * 2),
                        scaled(_mm512_cvtepi32_ps(hi), t * 2 + 1));
                } else if (KIND == FP8) {
                    _mm512_store_si512(row, e4m3.widen(from));
                } else {
                    __m512i bits = e4m3.widen(from);
                    __m512i lo = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits));
                    __m512i hi = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1));
                    put(row, scaled((__m512)_mm512_slli_epi32(lo, 16), t * 2),
                        scaled((__m512)_mm512_slli_epi32(hi, 16), t * 2 + 1));
                }
            }
    }
    __attribute__((always_inline)) void step(const char* packed, char* tiles) const {
        if (in_nibbles(KIND)) nibbles(packed, tiles);
        else bytes(packed, tiles);
    }
};
#endif
