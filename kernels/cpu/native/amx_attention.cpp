// Paged causal attention in bf16 on AMX tiles, decodes and prefill chunks by one path.
//
// A column is one (query, head) pair; all heads of a group share their keys, so up to 16 columns
// share a tile. Scores come transposed, S[key][column]: keys are read from their pages as left
// operands without being copied, and softmax runs down the lanes without horizontal reductions.
// A context is worked off in chunks of CHUNK positions, each with its own maximum, merged in order.
// Masked keys add exact zeros. So the result for a query depends on its position and its context
// alone: not on the batch, on threads, or on whether it came as a decode or within a prefill chunk.
#include "amx_tiles.h"

#if AMX_KERNELS
#include <cmath>
#include <vector>

constexpr int64_t CHUNK = 256;       // positions per softmax maximum
constexpr int64_t STEP = 32;         // positions per pair of key tiles
constexpr int64_t COLUMNS = 16;      // columns per tile
constexpr int64_t ITEM_COLUMNS = 128;  // columns that share one interleaving of the values

struct Step {
    const bf16 *q, *key_cache, *value_cache;
    const int32_t* tables;
    const int32_t* context_lens;
    const int32_t* query_start;
    bf16* out;
    int64_t table_stride, q_heads, kv_heads, block_size, dh, q_stride;
    float scale;
    int64_t group() const { return q_heads / kv_heads; }
};

// One unit of work: columns of one kv head of one sequence over a range of chunks.
struct Item {
    int64_t sequence, head, column, columns, begin, end;
    int64_t parts;  // > 1: this is the first of so many items whose states must be merged
    bool partial;   // the state is left for merging instead of being written out
};

// Running softmax of 16 columns: maximum, sum, and weighted values [16, dh].
struct State {
    float *max, *sum, *out;
    static int64_t floats(int64_t dh) { return 2 * COLUMNS + COLUMNS * dh; }
    State(float* at) : max(at), sum(at + COLUMNS), out(at + 2 * COLUMNS) {}
};

static void merge(State& into, const State& part, int64_t dh) {
    vf m0 = load(into.max), m1 = load(part.max), m = vmax(m0, m1);
    vf finite = select(m == splat(-INFINITY), splat(0.0f), m);
    float old_scale[LANES], new_scale[LANES];
    vf e0 = vexp(m0 - finite), e1 = vexp(m1 - finite);
    store(old_scale, e0);
    store(new_scale, e1);
    store(into.max, m);
    store(into.sum, load(into.sum) * e0 + load(part.sum) * e1);
    for (int64_t c = 0; c < COLUMNS; c++)
        for (int64_t d = 0; d < dh; d += LANES) {
            float* to = into.out + c * dh + d;
            store(to, load(to) * old_scale[c] + load(part.out + c * dh + d) * new_scale[c]);
        }
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

// Queries as right operands: [dh / 32][16 pairs of dimensions][16 columns][2].
static void pack_queries(const Step& s, const Item& w, int64_t column, int64_t count, uint32_t* to) {
    for (int64_t c = 0; c < COLUMNS; c++) {
        // Columns beyond the last repeat the first: computed, never written.
        int64_t flat = column + (c < count ? c : 0);
        int64_t token = s.query_start[w.sequence] + flat / s.group();
        const bf16* q = s.q + token * s.q_stride + (w.head * s.group() + flat % s.group()) * s.dh;
        for (int64_t pair = 0; pair < s.dh / 2; pair++) memcpy(to + pair * 16 + c, q + pair * 2, 4);
    }
}

struct Workspace {
    uint32_t* queries;  // [dh / 2][16]
    char* values;       // [CHUNK / 32][dh / 16] tiles
    char* keys;         // [CHUNK][dh], only where pages do not hold whole tiles
    float* scores;      // [CHUNK][16]
    char* weights;      // [CHUNK / 32] tiles of [16 columns][32 keys]
    float* products;    // State of one chunk
};

// Values of 32 positions, pairs of positions interleaved; positions beyond the context are zero,
// because what lies there may be anything, and 0 * NaN is NaN.
static void interleave_values(const bf16* const* rows, int64_t count, int64_t dh, char* tiles) {
    alignas(64) static const bf16 zeros[256] = {};
    __m512i low, high;
    {
        alignas(64) uint16_t a[32], b[32];
        for (int i = 0; i < 32; i++) {
            a[i] = (uint16_t)(i / 2 + (i % 2) * 32);
            b[i] = (uint16_t)(16 + i / 2 + (i % 2) * 32);
        }
        low = _mm512_load_si512(a);
        high = _mm512_load_si512(b);
    }
    for (int64_t pair = 0; pair < 16; pair++) {
        const bf16* even = 2 * pair < count ? rows[2 * pair] : zeros;
        const bf16* odd = 2 * pair + 1 < count ? rows[2 * pair + 1] : zeros;
        for (int64_t d = 0; d < dh; d += 32) {
            __m512i e = _mm512_loadu_si512(even + d), o = _mm512_loadu_si512(odd + d);
            char* to = tiles + d / 16 * 1024 + pair * 64;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(e, low, o));
            _mm512_store_si512(to + 1024, _mm512_permutex2var_epi16(e, high, o));
        }
    }
}

// scores[key][column] for 32 keys given as two groups of 16 rows.
static void score(const bf16* k0, const bf16* k1, int64_t dh, const uint32_t* queries, float* to) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t d = 0; d < dh; d += 32) {
        _tile_loadd(6, queries + d / 2 * 16, 64);
        _tile_loadd(4, k0 + d, dh * 2);
        _tile_loadd(5, k1 + d, dh * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
}

// Softmax down the keys; writes weights as left operands and the chunk's maximum and sum.
static void soften(float* scores, int64_t steps, int64_t begin, const int32_t* limits, float scale,
                   char* weights, State to) {
    vi limit;
    memcpy(&limit, limits, sizeof limit);
    int32_t lowest = limits[0];
    for (int c = 1; c < COLUMNS; c++) lowest = limits[c] < lowest ? limits[c] : lowest;
    vf best = splat(-INFINITY);
    for (int64_t i = 0; i < steps * STEP; i++) {
        vf v = load(scores + i * 16) * scale;
        if (begin + i > lowest) v = select(limit >= (int32_t)(begin + i), v, splat(-INFINITY));
        store(scores + i * 16, v);
        best = vmax(best, v);
    }
    vf finite = select(best == splat(-INFINITY), splat(0.0f), best);
    vf even = splat(0.0f), odd = splat(0.0f);
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i / 2 + (i % 2) * 16);
    __m512i interleave = _mm512_load_si512(order);
    for (int64_t step = 0; step < steps; step++) {
        __m512i pairs[16];
        for (int64_t i = 0; i < 16; i++) {
            const float* at = scores + (step * STEP + 2 * i) * 16;
            vf a = vexp(load(at) - finite), b = vexp(load(at + 16) - finite);
            even += a;
            odd += b;
            __m512bh both = _mm512_cvtne2ps_pbh(bit_copy<__m512>(b), bit_copy<__m512>(a));
            pairs[i] = _mm512_permutexvar_epi16(interleave, (__m512i)both);
        }
        transpose(pairs);
        for (int64_t c = 0; c < 16; c++)
            _mm512_store_si512(weights + step * 1024 + c * 64, pairs[c]);
    }
    store(to.max, best);
    store(to.sum, even + odd);
}

// to[16][dh] (columns d .. d + 16 NT) = weights x values.
template <int NT>
static void weigh(const char* weights, const char* values, int64_t steps, int64_t dh, float* to) {
    _tile_zero(0);
    if (NT > 1) _tile_zero(1);
    if (NT > 2) _tile_zero(2);
    if (NT > 3) _tile_zero(3);
    for (int64_t s = 0; s < steps; s++) {
        const char* v = values + s * dh * 64;
        _tile_loadd(4, weights + s * 1024, 64);
        _tile_loadd(6, v, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (NT > 1) {
            _tile_loadd(7, v + 1024, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (NT > 2) {
            _tile_loadd(6, v + 2048, 64);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (NT > 3) {
            _tile_loadd(7, v + 3072, 64);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    _tile_stored(0, to, dh * 4);
    if (NT > 1) _tile_stored(1, to + 16, dh * 4);
    if (NT > 2) _tile_stored(2, to + 32, dh * 4);
    if (NT > 3) _tile_stored(3, to + 48, dh * 4);
}

static void write_columns(const Step& s, const Item& w, int64_t column, int64_t count,
                          const State& state) {
    for (int64_t c = 0; c < count; c++) {
        int64_t flat = column + c;
        int64_t token = s.query_start[w.sequence] + flat / s.group();
        bf16* to = s.out + (token * s.q_heads + w.head * s.group() + flat % s.group()) * s.dh;
        for (int64_t d = 0; d < s.dh; d += LANES)
            store(to + d, load(state.out + c * s.dh + d) / state.sum[c]);
    }
}

static void attend(const Step& s, const Item& w, Workspace ws, float* states) {
    int64_t context = s.context_lens[w.sequence], dh = s.dh, group = s.group();
    int64_t queries = s.query_start[w.sequence + 1] - s.query_start[w.sequence];
    const int32_t* table = s.tables + w.sequence * s.table_stride;
    bool whole_tiles = s.block_size % 16 == 0;
    int64_t blocks = (w.columns + COLUMNS - 1) / COLUMNS;
    auto row = [&](const bf16* cache, int64_t position) {
        int64_t page = (table[position / s.block_size] * s.kv_heads + w.head) * s.block_size;
        return cache + (page + position % s.block_size) * dh;
    };
    for (int64_t begin = w.begin; begin < w.end; begin += CHUNK) {
        int64_t end = begin + CHUNK < w.end ? begin + CHUNK : w.end;
        int64_t steps = (end - begin + STEP - 1) / STEP;
        const bf16 *keys[CHUNK / 16], *values[CHUNK];
        for (int64_t at = begin; at < end; at++)
            values[at - begin] = at > begin && at % s.block_size ? values[at - begin - 1] + dh
                                                                 : row(s.value_cache, at);
        for (int64_t i = 0; i < steps; i++) {
            // Pages are too short for the hardware to run ahead, so ask for the keys of these
            // positions, needed soon, and for the values of the next ones, needed first.
            for (int64_t j = i * STEP; j < (i + 1) * STEP && j < end - begin; j++) {
                const char* key = (const char*)(s.key_cache + (values[j] - s.value_cache));
                for (int64_t line = 0; line < dh * 2; line += 64) _mm_prefetch(key + line, _MM_HINT_T1);
                if (j + STEP >= end - begin) continue;
                const char* value = (const char*)values[j + STEP];
                for (int64_t line = 0; line < dh * 2; line += 64) _mm_prefetch(value + line, _MM_HINT_T0);
            }
            interleave_values(values + i * STEP, end - begin - i * STEP, dh,
                              ws.values + i * dh * 64);
            for (int64_t t = 0; t < 2; t++) {
                int64_t first = begin + i * STEP + t * 16;
                if (first >= context) {
                    keys[i * 2 + t] = keys[i * 2];
                } else if (whole_tiles) {
                    keys[i * 2 + t] = row(s.key_cache, first);
                } else {
                    char* copy = ws.keys + (i * 2 + t) * 16 * dh * 2;
                    for (int64_t j = 0; j < 16; j++) {
                        int64_t at = first + j < context ? first + j : context - 1;
                        memcpy(copy + j * dh * 2, row(s.key_cache, at), dh * 2);
                    }
                    keys[i * 2 + t] = (const bf16*)copy;
                }
            }
        }
        for (int64_t b = 0; b < blocks; b++) {
            int64_t column = w.column + b * COLUMNS;
            int64_t count = w.column + w.columns - column < COLUMNS ? w.column + w.columns - column
                                                                   : COLUMNS;
            int32_t limits[COLUMNS], furthest = 0;
            for (int64_t c = 0; c < COLUMNS; c++) {
                limits[c] = (int32_t)(context - queries + (column + (c < count ? c : 0)) / group);
                furthest = limits[c] > furthest ? limits[c] : furthest;
            }
            State state(states + b * State::floats(dh));
            if (furthest < begin) continue;
            int64_t needed = (furthest - begin) / STEP + 1;
            if (needed > steps) needed = steps;
            pack_queries(s, w, column, count, ws.queries);
            for (int64_t i = 0; i < needed; i++)
                score(keys[2 * i], keys[2 * i + 1], dh, ws.queries, ws.scores + i * STEP * 16);
            State part = begin == w.begin ? state : State(ws.products);
            soften(ws.scores, needed, begin, limits, s.scale, ws.weights, part);
            for (int64_t d = 0; d < dh; d += 64) {
                const char* v = ws.values + d / 16 * 1024;
                if (dh - d >= 64) weigh<4>(ws.weights, v, needed, dh, part.out + d);
                else weigh<2>(ws.weights, v, needed, dh, part.out + d);
            }
            if (begin != w.begin) merge(state, part, dh);
        }
    }
    if (w.partial) return;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t column = w.column + b * COLUMNS, left = w.column + w.columns - column;
        write_columns(s, w, column, left < COLUMNS ? left : COLUMNS,
                      State(states + b * State::floats(dh)));
    }
}

static void plan(const Step& s, int64_t sequences, std::vector<Item>& items) {
    for (int64_t i = 0; i < sequences; i++) {
        int64_t context = s.context_lens[i];
        int64_t queries = s.query_start[i + 1] - s.query_start[i];
        int64_t columns = queries * s.group();
        for (int64_t h = 0; h < s.kv_heads; h++)
            if (queries == 1) {
                for (int64_t c = 0; c < columns; c += COLUMNS) {
                    int64_t parts = (context + CHUNK - 1) / CHUNK;
                    int64_t count = columns - c < COLUMNS ? columns - c : COLUMNS;
                    for (int64_t p = 0; p < parts; p++) {
                        int64_t end = (p + 1) * CHUNK < context ? (p + 1) * CHUNK : context;
                        items.push_back({i, h, c, count, p * CHUNK, end, p ? 0 : parts, parts > 1});
                    }
                }
            } else {
                for (int64_t c = 0; c < columns; c += ITEM_COLUMNS) {
                    int64_t count = columns - c < ITEM_COLUMNS ? columns - c : ITEM_COLUMNS;
                    int64_t last = context - queries + (c + count - 1) / s.group();
                    items.push_back({i, h, c, count, 0, last + 1, 1, false});
                }
            }
    }
}
#endif

// Shapes as in kernels.ops; query_start int32 [sequences + 1]; dh a multiple of 32, at most 256.
EXPORT void amx_attention(const void* q, const void* key_cache, const void* value_cache,
                          const int32_t* tables, int64_t table_stride, const int32_t* context_lens,
                          const int32_t* query_start, void* out, int64_t sequences, int64_t q_heads,
                          int64_t kv_heads, int64_t block_size, int64_t dh, int64_t q_stride,
                          float scale, int threads) {
#if AMX_KERNELS
    Step step{(const bf16*)q, (const bf16*)key_cache, (const bf16*)value_cache, tables,
              context_lens,   query_start,            (bf16*)out,               table_stride,
              q_heads,        kv_heads,               block_size,               dh,
              q_stride,       scale};
    static thread_local std::vector<Item> planned;
    planned.clear();
    plan(step, sequences, planned);
    const Item* items = planned.data();
    int64_t count = (int64_t)planned.size();
    int64_t state_floats = State::floats(dh);
    bool merging = false;
    for (int64_t i = 0; i < count; i++) merging = merging || items[i].partial;
    // Decode states outlive their item until they are merged; prefill states do not.
    float* kept = merging ? (float*)scratch<3>(count * state_floats * 4) : nullptr;
    if (count == 1) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        configure_tiles(16);
        int64_t own = ITEM_COLUMNS / COLUMNS * state_floats * 4;
        char* memory = scratch<4>(own + state_floats * 4 + CHUNK * (dh * 4 + 64 + 32) + dh * 32);
        Workspace ws;
        float* states = (float*)memory;
        ws.values = memory + own;
        ws.keys = ws.values + CHUNK * dh * 2;
        ws.scores = (float*)(ws.keys + CHUNK * dh * 2);
        ws.weights = (char*)(ws.scores + CHUNK * 16);
        ws.queries = (uint32_t*)(ws.weights + CHUNK * 32);
        ws.products = (float*)(ws.queries + dh * 8);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++)
            attend(step, items[i], ws, items[i].partial ? kept + i * state_floats : states);
        if (merging) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) {
                if (!items[i].partial || items[i].parts == 0) continue;
                State into(kept + i * state_floats);
                for (int64_t p = 1; p < items[i].parts; p++)
                    merge(into, State(kept + (i + p) * state_floats), dh);
                write_columns(step, items[i], items[i].column, items[i].columns, into);
            }
        }
        _tile_release();
    }
#else
    (void)q, (void)key_cache, (void)value_cache, (void)tables, (void)table_stride;
    (void)context_lens, (void)query_start, (void)out, (void)sequences, (void)q_heads;
    (void)kv_heads, (void)block_size, (void)dh, (void)q_stride, (void)scale, (void)threads;
#endif
}
