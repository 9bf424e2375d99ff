// Makes the pages of one chunk of positions ready for AMX tiles: keys as left operands (read where
// they lie if they can be), values as right operands, both widened to bf16 if they are quantized.
#pragma once
#include "amx_tiles.h"
#include "attention_step.h"
#include "kv_formats.h"

#if AMX_KERNELS
constexpr int64_t CHUNK = 256;  // positions per softmax maximum
constexpr int64_t STEP = 32;    // positions per pair of key tiles

// Positions [begin, end) of one chunk, begin a multiple of STEP; those below `first` lie before
// every window: their pages may belong to others and are not read.
struct Span {
    int64_t begin, first, end;
    int64_t steps() const { return (end - begin + STEP - 1) / STEP; }
};

struct Pages {
    char* values;                // [CHUNK / 32][dh / 16] tiles of 32 positions
    char* widened;               // [CHUNK][dh] bf16, where keys cannot be read in place
    float* key_scales;           // [CHUNK], 0 outside the span; times UNIT of the format
    float* value_scales;         // likewise
    const char* keys[CHUNK / 16];  // 16 rows of dh bf16 each
    int64_t rows[CHUNK];         // numbers of the rows in the cache

    static int64_t bytes(int64_t dh) { return CHUNK * (dh * 4 + 8); }
    void place(char* memory, int64_t dh) {
        values = memory;
        widened = values + CHUNK * dh * 2;
        key_scales = (float*)(widened + CHUNK * dh * 2);
        value_scales = key_scales + CHUNK;
    }
};

// Elements are read as bf16(x) * UNIT.
template <class C>
constexpr float UNIT = 1.0f;
template <>
constexpr float UNIT<e4m3> = 256.0f;  // the exponent of half precision is biased by 8 more

static inline __m512 widen16(const i8* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline __m512 widen16(const e4m3* p) {
    __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
    __m256i sign = _mm256_and_si256(wide, _mm256_set1_epi16((short)0x8000));
    return _mm512_cvtph_ps(_mm256_or_si256(magnitude, sign));
}

static inline void widen_row(const bf16* from, int64_t dh, char* to) { memcpy(to, from, dh * 2); }
template <class C>
static inline void widen_row(const C* from, int64_t dh, char* to) {
    for (int64_t d = 0; d < dh; d += 32) {
        __m512bh both = _mm512_cvtne2ps_pbh(widen16(from + d + 16), widen16(from + d));
        _mm512_store_si512(to + d * 2, (__m512i)both);
    }
}

// Two rows' 32 dimensions in two tiles' lines: even and odd position side by side.
static inline void interleave_pair(const bf16* even, const bf16* odd, char* to) {
    struct Order {
        uint16_t low[32] = {}, high[32] = {};
        constexpr Order() {
            for (int i = 0; i < 32; i++) {
                low[i] = (uint16_t)(i / 2 + (i % 2) * 32);
                high[i] = (uint16_t)(16 + i / 2 + (i % 2) * 32);
            }
        }
    };
    alignas(64) static constexpr Order order;
    __m512i e = _mm512_loadu_si512(even), o = _mm512_loadu_si512(odd);
    _mm512_store_si512(to, _mm512_permutex2var_epi16(e, _mm512_load_si512(order.low), o));
    _mm512_store_si512(to + 1024, _mm512_permutex2var_epi16(e, _mm512_load_si512(order.high), o));
}
// The value is exact in bf16, the upper half of the float.
template <class C>
static inline void interleave_pair(const C* even, const C* odd, char* to) {
    for (int t = 0; t < 2; t++) {
        __m512i e = (__m512i)widen16(even + t * 16), o = (__m512i)widen16(odd + t * 16);
        _mm512_store_si512(to + t * 1024, _mm512_or_si512(_mm512_srli_epi32(e, 16), o));
    }
}

// Values of the 32 positions from `at`; those outside the span are zero, because what lies there
// may be anything, and 0 * NaN is NaN.
template <class C>
static void interleave_values(const AttentionStep& s, const Pages& p, const Span& span, int64_t at,
                              char* tiles) {
    alignas(64) static const C zeros[256] = {};
    const C* values = (const C*)s.values;
    auto row = [&](int64_t position) {
        bool inside = position >= span.first && position < span.end;
        return inside ? values + p.rows[position - span.begin] * s.dh : zeros;
    };
    const bool whole = at >= span.first && at + STEP <= span.end;
    const int64_t* rows = p.rows + (at - span.begin);
    for (int64_t pair = 0; pair < 16; pair++) {
        const C* even = whole ? values + rows[2 * pair] * s.dh : row(at + 2 * pair);
        const C* odd = whole ? values + rows[2 * pair + 1] * s.dh : row(at + 2 * pair + 1);
        for (int64_t d = 0; d < s.dh; d += 32)
            interleave_pair(even + d, odd + d, tiles + d / 16 * 1024 + pair * 64);
    }
}

// Sixteen keys from `at` on. Rows outside the span are of some key within it or of its page; their
// scores are masked.
template <class C>
static const char* key_tile(const AttentionStep& s, const Pages& p, const Span& span, int64_t at) {
    const C* keys = (const C*)s.keys;
    if (sizeof(C) == sizeof(bf16) && s.block_size % 16 == 0) {
        int64_t known = at > span.first ? at : span.first;
        return (const char*)(keys + (p.rows[known - span.begin] - (known - at)) * s.dh);
    }
    char* copy = p.widened + (at - span.begin) * s.dh * 2;
    const int64_t* rows = p.rows + (at - span.begin);
    if (at >= span.first && at + 16 <= span.end) {
        for (int64_t j = 0; j < 16; j++)
            widen_row(keys + rows[j] * s.dh, s.dh, copy + j * s.dh * 2);
        return copy;
    }
    for (int64_t j = 0; j < 16; j++) {
        int64_t known = at + j > span.first ? at + j : span.first;
        known = known < span.end ? known : span.end - 1;
        widen_row(keys + p.rows[known - span.begin] * s.dh, s.dh, copy + j * s.dh * 2);
    }
    return copy;
}

static inline void prefetch(const void* row, int64_t bytes, bool soon) {
    for (int64_t line = 0; line < bytes; line += 64)
        if (soon) _mm_prefetch((const char*)row + line, _MM_HINT_T0);
        else _mm_prefetch((const char*)row + line, _MM_HINT_T1);
}

// Pages are too short for the hardware to run ahead, so ask for the step `at` begins: values are
// needed soon, keys too if they must be widened.
template <class C>
static inline void prefetch_step(const AttentionStep& s, const Pages& p, const Span& span,
                                 int64_t at) {
    const int64_t row_bytes = s.dh * sizeof(C);
    const int64_t from = at > span.first ? at : span.first;
    const int64_t until = at + STEP < span.end ? at + STEP : span.end;
    for (int64_t j = from - span.begin; j < until - span.begin; j++) {
        prefetch((const C*)s.values + p.rows[j] * s.dh, row_bytes, true);
        prefetch((const C*)s.keys + p.rows[j] * s.dh, row_bytes, sizeof(C) == 1);
    }
}

// Numbers the span's rows, page by page.
static inline void number_rows(const AttentionStep& s, const int32_t* table, int64_t head,
                               const Span& span, int64_t* rows) {
    int64_t page = span.first / s.block_size, at = span.first;
    while (at < span.end) {
        int64_t next = (page + 1) * s.block_size, until = next < span.end ? next : span.end;
        int64_t row = (table[page] * s.kv_heads + head) * s.block_size + at - page * s.block_size;
        if (s.key_scales) {
            prefetch(s.key_scales + row, (until - at) * 4, true);
            prefetch(s.value_scales + row, (until - at) * 4, true);
        }
        for (int64_t i = at - span.begin; i < until - span.begin; i++) rows[i] = row++;
        at = until;
        page++;
    }
}

// Memory is slow to answer and a core has few requests under way, so while the tiles and the
// softmax work, the rows of the thread's next item are asked for, a few at a time.
struct Ahead {
    const char *keys, *values;
    int64_t row_bytes, count = 0, at = 0, rows[CHUNK];

    void begin(const AttentionStep& s, const int32_t* table, int64_t head, const Span& span,
               int64_t element) {
        keys = (const char*)s.keys, values = (const char*)s.values, row_bytes = s.dh * element;
        number_rows(s, table, head, span, rows);
        at = span.first - span.begin, count = span.end - span.begin;
    }
    void fetch(int64_t some) {
        for (int64_t end = at + some < count ? at + some : count; at < end; at++) {
            prefetch(values + rows[at] * row_bytes, row_bytes, false);
            prefetch(keys + rows[at] * row_bytes, row_bytes, false);
        }
    }
};

template <class C>
static void gather_scales(const AttentionStep& s, const Span& span, Pages& p) {
    const int64_t first = span.first - span.begin, end = span.end - span.begin;
    for (int64_t i = 0; i < first; i++) p.key_scales[i] = p.value_scales[i] = 0.0f;
    for (int64_t i = first; i < end; i++) {
        p.key_scales[i] = s.key_scales[p.rows[i]] * UNIT<C>;
        p.value_scales[i] = s.value_scales[p.rows[i]] * UNIT<C>;
    }
    for (int64_t i = end; i < span.steps() * STEP; i++) p.key_scales[i] = p.value_scales[i] = 0.0f;
}

template <class C>
static void ready_pages(const AttentionStep& s, const int32_t* table, int64_t head,
                        const Span& span, Pages& p) {
    number_rows(s, table, head, span, p.rows);
    prefetch_step<C>(s, p, span, span.begin);
    for (int64_t i = 0; i < span.steps(); i++) {
        int64_t at = span.begin + i * STEP;
        prefetch_step<C>(s, p, span, at + STEP);
        interleave_values<C>(s, p, span, at, p.values + i * s.dh * 64);
        bool left = at + 16 > span.first, right = at + 16 < span.end;
        if (left) p.keys[i * 2] = key_tile<C>(s, p, span, at);
        if (right) p.keys[i * 2 + 1] = key_tile<C>(s, p, span, at + 16);
        if (!left) p.keys[i * 2] = p.keys[i * 2 + 1];
        if (!right) p.keys[i * 2 + 1] = p.keys[i * 2];
    }
    if (s.key_scales) gather_scales<C>(s, span, p);
}
#endif
