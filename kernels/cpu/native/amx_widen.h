// Quantized panels made bf16 tiles, one step (32 positions of K, 32 columns) at a time.
//
// Nibbles: 2 x 256 bytes a step; a dword holds those of 8 half rows. Int8: 2 x [16 rows][16
// columns][2 of K]. FP8: the same by pairs of rows, 8 bytes of each in turn. Scales and zeros are
// [panels, groups, 32], or [panels, groups] for FP8 in blocks; FP8 by channel is exact in bf16 and
// leaves its scales to the output.
#pragma once
#include <cmath>
#include "amx_tiles.h"

#if AMX_KERNELS
enum Kind { DENSE = 0, INT8 = 1, INT4 = 2, TABLE4 = 3, INT8_GROUPS = 4, FP8 = 5, FP8_BLOCKS = 6 };

// As Python's `_AmxWeight` describes it.
struct Weight {
    const char* data;
    const char* scales;  // INT8, FP8: float32 [n]; FP8_BLOCKS: float32 [panels, groups]
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

// e4m3 -> bf16 by looking up both bytes of what the lower seven bits stand for.
struct E4m3 {
    __m512i low[2], high[2];

    // Values of the codes 0..127.
    static const float* values() {
        struct Values {
            float of[128];
            Values() {
                for (int code = 0; code < 128; code++) {
                    int exponent = code >> 3, fraction = code & 7;
                    of[code] = exponent ? ldexpf(8 + fraction, exponent - 10) : fraction * 0x1p-9f;
                }
                of[127] = NAN;
            }
        };
        static const Values all;
        return all.of;
    }
    void scale_by(float scale) {
        const float* value = values();
        __m512 s = _mm512_set1_ps(scale);
        for (int half = 0; half < 2; half++) {
            __m256i low_bytes[2], high_bytes[2];
            for (int i = 0; i < 2; i++) {
                const float* from = value + half * 64 + i * 32;
                __m512 first = _mm512_mul_ps(_mm512_loadu_ps(from), s);
                __m512 second = _mm512_mul_ps(_mm512_loadu_ps(from + 16), s);
                __m512i words = (__m512i)_mm512_cvtne2ps_pbh(second, first);
                low_bytes[i] = _mm512_cvtepi16_epi8(words);
                high_bytes[i] = _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8));
            }
            low[half] = _mm512_inserti64x4(_mm512_castsi256_si512(low_bytes[0]), low_bytes[1], 1);
            high[half] = _mm512_inserti64x4(_mm512_castsi256_si512(high_bytes[0]), high_bytes[1], 1);
        }
    }
    // 64 codes -> two rows of a tile.
    __attribute__((always_inline)) void widen(const char* from, char* rows) const {
        __m512i code = _mm512_loadu_si512(from);
        __m512i l = _mm512_permutex2var_epi8(low[0], code, low[1]);
        __m512i h = _mm512_permutex2var_epi8(high[0], code, high[1]);
        h = _mm512_ternarylogic_epi32(h, code, _mm512_set1_epi8((char)0x80), 0xf8);  // h | code & 80
        _mm512_store_si512(rows, _mm512_unpacklo_epi8(l, h));
        _mm512_store_si512(rows + 64, _mm512_unpackhi_epi8(l, h));
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
        if (KIND == FP8) e4m3.scale_by(1.0f);
    }
    // Take up the scales and zeros of one group; `index` counts the groups of all panels.
    void group(const Weight& w, int64_t index) {
        if (KIND == FP8_BLOCKS) return e4m3.scale_by(((const float*)w.scales)[index]);
        int64_t at = index * 32;
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
    // With STREAM, what lies ahead is asked for: of bytes line by line, since a burst of 16 requests
    // would hold up the reads behind them.
    template <bool STREAM>
    static __attribute__((always_inline)) void fetch(const char* line) {
        if (STREAM) _mm_prefetch(line + 8192, _MM_HINT_T1);
    }
    static __attribute__((always_inline)) void put(char* row, __m512 lo, __m512 hi) {
        _mm512_store_si512(row, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
    }
    template <bool STREAM>
    __attribute__((always_inline)) void nibbles(const char* packed, char* tiles) const {
        for (int line = 0; line < 8; line++) fetch<STREAM>(packed + line * 64);
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
    template <bool STREAM>
    __attribute__((always_inline)) void bytes(const char* packed, char* tiles) const {
        for (int t = 0; t < 2; t++)
#pragma GCC unroll 4
            for (int r = 0; r < 16; r++) {
                const char* from = packed + t * 512 + r * 32;
                if (r % 2 == 0) fetch<STREAM>(from);
                __m512i lo = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
                __m512i hi = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + 16)));
                put(tiles + t * 1024 + r * 64, scaled(_mm512_cvtepi32_ps(lo), t * 2),
                    scaled(_mm512_cvtepi32_ps(hi), t * 2 + 1));
            }
    }
    template <bool STREAM>
    __attribute__((always_inline)) void e4m3s(const char* packed, char* tiles) const {
#pragma GCC unroll 4
        for (int pair = 0; pair < 16; pair++) {
            fetch<STREAM>(packed + pair * 64);
            e4m3.widen(packed + pair * 64, tiles + pair * 128);
        }
    }
    template <bool STREAM>
    __attribute__((always_inline)) void step(const char* packed, char* tiles) const {
        if (in_nibbles(KIND)) nibbles<STREAM>(packed, tiles);
        else if (KIND == INT8_GROUPS) bytes<STREAM>(packed, tiles);
        else e4m3s<STREAM>(packed, tiles);
    }
};
#endif
