// Softmax of one chunk's scores on AMX: scores S[key][column] in, weights as left operands out.
#pragma once
#include "amx_pages.h"

#if AMX_KERNELS
#include <cmath>

constexpr int64_t COLUMNS = 16;  // (query, head) pairs per tile
constexpr int64_t FEW = 4;       // of them, for which there is a faster way

// Running softmax of 16 columns: maximum, sum, and weighted values [16, dh].
struct State {
    float *max, *sum, *out;
    static int64_t floats(int64_t dh) { return 2 * COLUMNS + COLUMNS * dh; }
    State(float* at) : max(at), sum(at + COLUMNS), out(at + 2 * COLUMNS) {}
};

// What 16 columns see: positions from `from` to `to`, both included.
struct Reach {
    alignas(64) int32_t from[COLUMNS], to[COLUMNS];
    alignas(64) uint32_t tree[2][COLUMNS];  // bits: which positions from tree_from on are seen
    int32_t first, last, all_from, all_to;  // any column sees first .. last, every one all_*
    int32_t tree_from;                      // beyond `last` if no tree hides anything
};

// What trees of drafted tokens leave visible: the lanes' columns, whose 64 bits are `low` and
// `high`, and their positions, counted from the first that a bit stands for.
static inline vi in_tree(vu low, vu high, vi position) {
    vu upper = bit_copy<vu>(position > 31);
    vu bits = (low & ~upper) | (high & upper);
    return ((bits >> (bit_copy<vu>(position) & 31u) & 1u) != 0) | (position < 0) | (position > 63);
}

// 16 x 16 dwords: rows become columns.
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// Softmax down the keys of `steps` from position `begin` on; writes weights as left operands and
// the maximum and sum. Scales, if any, are those of the keys and values.
static void soften(const AttentionStep& s, float* scores, int64_t steps, int64_t begin,
                   const Reach& reach, const float* key_scales, const float* value_scales,
                   char* weights, Ahead& ahead, State to) {
    vi from, until;
    memcpy(&from, reach.from, sizeof from);
    memcpy(&until, reach.to, sizeof until);
    vu low, high;
    memcpy(&low, reach.tree[0], sizeof low);
    memcpy(&high, reach.tree[1], sizeof high);
    vf best = splat(-INFINITY);
    for (int64_t i = 0; i < steps * STEP; i++) {
        if (i % STEP == 0) ahead.fetch(12);
        int32_t position = (int32_t)(begin + i);
        vf v = load(scores + i * 16) * s.scale;
        if (key_scales) v *= key_scales[i];
        if (s.soft_cap) v = s.soft_cap * vtanh(v / s.soft_cap);
        if (position > reach.all_to || position < reach.all_from)
            v = select((until >= position) & (from <= position), v, splat(-INFINITY));
        if (position >= reach.tree_from)
            v = select(in_tree(low, high, vi{} + (position - reach.tree_from)), v, splat(-INFINITY));
        store(scores + i * 16, v);
        best = vmax(best, v);
    }
    vf finite = select(best == splat(-INFINITY), splat(0.0f), best);
    vf sums[4] = {};  // by the key's number modulo 4, as soften_few adds too
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i / 2 + (i % 2) * 16);
    __m512i interleave = _mm512_load_si512(order);
    for (int64_t step = 0; step < steps; step++) {
        __m512i pairs[16];
        ahead.fetch(12);
        for (int64_t i = 0; i < 16; i++) {
            int64_t key = step * STEP + 2 * i;
            vf a = vexp(load(scores + key * 16) - finite);
            vf b = vexp(load(scores + key * 16 + 16) - finite);
            sums[i % 2 * 2] += a;
            sums[i % 2 * 2 + 1] += b;
            if (value_scales) {
                a *= value_scales[key];
                b *= value_scales[key + 1];
            }
            __m512bh both = _mm512_cvtne2ps_pbh(bit_copy<__m512>(b), bit_copy<__m512>(a));
            pairs[i] = _mm512_permutexvar_epi16(interleave, (__m512i)both);
        }
        transpose(pairs);
        for (int64_t c = 0; c < 16; c++)
            _mm512_store_si512(weights + step * 1024 + c * 64, pairs[c]);
    }
    store(to.max, best);
    store(to.sum, (sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Four columns of one of the four keys.
static inline __m128 quarter(vf v, int i) {
    alignas(64) float lanes[LANES];
    store(lanes, v);
    return _mm_load_ps(lanes + i * FEW);
}

// As soften, for at most FEW columns: a vector is four keys of four columns, not one of sixteen.
// Every column's numbers are those of soften to the last bit; weights of other columns stay.
static void soften_few(const AttentionStep& s, float* scores, int64_t steps, int64_t begin,
                       const Reach& reach, const float* key_scales, const float* value_scales,
                       char* weights, Ahead& ahead, State to) {
    vi from, until, key;
    vu low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = reach.tree[0][i % FEW], high[i] = reach.tree[1][i % FEW];
        from[i] = reach.from[i % FEW], until[i] = reach.to[i % FEW];
        key[i] = i / FEW;
    }
    auto widely = [&](const float* of_keys) {
        __m512 four = _mm512_castps128_ps512(_mm_loadu_ps(of_keys));
        return bit_copy<vf>(_mm512_permutexvar_ps((__m512i)key, four));
    };
    vf best = splat(-INFINITY);
    for (int64_t i = 0; i < steps * STEP; i += 4) {
        if (i % STEP == 0) ahead.fetch(12);
        const float* rows = scores + i * COLUMNS;
        __m512 joined = _mm512_castps128_ps512(_mm_load_ps(rows));
        joined = _mm512_insertf32x4(joined, _mm_load_ps(rows + COLUMNS), 1);
        joined = _mm512_insertf32x4(joined, _mm_load_ps(rows + 2 * COLUMNS), 2);
        joined = _mm512_insertf32x4(joined, _mm_load_ps(rows + 3 * COLUMNS), 3);
        vf v = bit_copy<vf>(joined) * s.scale;
        if (key_scales) v *= widely(key_scales + i);
        if (s.soft_cap) v = s.soft_cap * vtanh(v / s.soft_cap);
        int32_t position = (int32_t)(begin + i);
        if (position + 3 > reach.all_to || position < reach.all_from) {
            vi positions = key + position;
            v = select((until >= positions) & (from <= positions), v, splat(-INFINITY));
        }
        if (position + 3 >= reach.tree_from)
            v = select(in_tree(low, high, key + (position - reach.tree_from)), v, splat(-INFINITY));
        store(scores + i * 4, v);  // over rows that were read
        best = vmax(best, v);
    }
    __m128 most = _mm_max_ps(_mm_max_ps(quarter(best, 0), quarter(best, 1)),
                             _mm_max_ps(quarter(best, 2), quarter(best, 3)));
    best = bit_copy<vf>(_mm512_broadcast_f32x4(most));
    vf finite = select(best == splat(-INFINITY), splat(0.0f), best);
    alignas(64) uint16_t order[2][32];  // two columns of sixteen keys
    for (int i = 0; i < 32; i++)
        for (int c = 0; c < 2; c++)
            order[c][i] = (uint16_t)(i % 16 / 8 * 32 + i % 8 * FEW + c * 2 + i / 16);
    __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
    vf sums = splat(0.0f);
    for (int64_t step = 0; step < steps; step++) {
        ahead.fetch(12);
        for (int64_t half = 0; half < 2; half++) {
            __m512bh eights[2];
            for (int64_t e = 0; e < 2; e++) {
                vf p[2];
                for (int64_t f = 0; f < 2; f++) {
                    int64_t i = step * STEP + half * 16 + e * 8 + f * 4;
                    p[f] = vexp(load(scores + i * 4) - finite);
                    sums += p[f];
                    if (value_scales) p[f] *= widely(value_scales + i);
                }
                eights[e] = _mm512_cvtne2ps_pbh(bit_copy<__m512>(p[1]), bit_copy<__m512>(p[0]));
            }
            __m512i a = (__m512i)eights[0], b = (__m512i)eights[1];
            __m512i c01 = _mm512_permutex2var_epi16(a, first, b);
            __m512i c23 = _mm512_permutex2var_epi16(a, second, b);
            char* at = weights + step * 1024 + half * 32;
            _mm256_store_si256((__m256i*)at, _mm512_castsi512_si256(c01));
            _mm256_store_si256((__m256i*)(at + 64), _mm512_extracti64x4_epi64(c01, 1));
            _mm256_store_si256((__m256i*)(at + 128), _mm512_castsi512_si256(c23));
            _mm256_store_si256((__m256i*)(at + 192), _mm512_extracti64x4_epi64(c23, 1));
        }
    }
    __m128 sum = _mm_add_ps(_mm_add_ps(quarter(sums, 0), quarter(sums, 1)),
                            _mm_add_ps(quarter(sums, 2), quarter(sums, 3)));
    store(to.max, best);
    store(to.sum, bit_copy<vf>(_mm512_broadcast_f32x4(sum)));
}
#endif
