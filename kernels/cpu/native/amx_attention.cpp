// Paged causal attention in bf16 on AMX tiles, decodes and prefill chunks by one path.
//
// A column is one (query, head) pair; all heads of a group share their keys, so up to 16 columns
// share a tile. Scores come transposed, S[key][column]: keys are read from their pages as left
// operands without being copied, and softmax runs down the lanes without horizontal reductions.
// A context is worked off in chunks of CHUNK positions, each with its own maximum, merged in order.
// Masked keys add exact zeros. Quantized keys and values are integers, or as few bits, to the tiles;
// their scales multiply scores and weights in float32. So the result for a query depends on its position and its context
// alone: not on the batch, on threads, or on whether it came as a decode or within a prefill chunk.
#include "amx_softmax.h"
#include "replay.h"

#if AMX_KERNELS
#include <cmath>
#include <vector>

constexpr int64_t ITEM_COLUMNS = 128;  // columns that share one interleaving of the values
constexpr int64_t SHORT_COLUMNS = 64;  // a sequence of so few is worked off in short items

// One unit of work: columns of one kv head of one sequence over positions [begin, end).
struct Item {
    int64_t sequence, head, column, columns, begin, end;
    int64_t parts;  // > 1: this is the first of so many items whose states must be merged
    int64_t state;  // number of the first of its columns' states that are kept for merging, or -1

    int64_t blocks() const { return (columns + COLUMNS - 1) / COLUMNS; }
    int64_t count(int64_t block) const {
        int64_t left = columns - block * COLUMNS;
        return left < COLUMNS ? left : COLUMNS;
    }
};

// The state of columns that see nothing.
static void clear(State& state, int64_t dh) {
    store(state.max, splat(-INFINITY));
    store(state.sum, splat(0.0f));
    memset(state.out, 0, COLUMNS * dh * sizeof(float));
}

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

// The token and the head within its group of a column, counted up without divisions.
struct Column {
    int64_t token, head, group;
    Column(int64_t flat, int64_t group) : token(flat / group), head(flat % group), group(group) {}
    void next() {
        if (++head == group) head = 0, token++;
    }
};

// Queries as right operands: [dh / 32][16 pairs of dimensions][16 columns][2].
static void pack_queries(const AttentionStep& s, const Item& w, int64_t column, int64_t count, uint32_t* to) {
    const bf16* rows[COLUMNS];
    const bf16* first = (const bf16*)s.q + s.query_start[w.sequence] * s.q_stride;
    Column at(column, s.group());
    for (int64_t c = 0; c < COLUMNS; c++, at.next())
        // Columns beyond the last repeat the first: computed, never written.
        rows[c] = c < count ? first + at.token * s.q_stride + (w.head * s.group() + at.head) * s.dh : rows[0];
    for (int64_t d = 0; d < s.dh; d += 32) {
        __m512i pairs[16];
        for (int64_t c = 0; c < COLUMNS; c++) pairs[c] = _mm512_loadu_si512(rows[c] + d);
        transpose(pairs);
        for (int64_t pair = 0; pair < 16; pair++)
            _mm512_storeu_si512(to + (d / 2 + pair) * 16, pairs[pair]);
    }
}

struct Workspace {
    Pages pages;
    Ahead ahead;
    uint32_t* queries;  // [dh / 2][16]
    float* scores;      // [CHUNK][16]
    char* weights;      // [CHUNK / 32] tiles of [16 columns][32 keys]
    float* products;    // State of one chunk

    static int64_t bytes(int64_t dh) {
        return Pages::bytes(dh) + CHUNK * (64 + 32) + dh * 32 + State::floats(dh) * 4;
    }
    explicit Workspace(char* memory, int64_t dh) {
        pages.place(memory, dh);
        scores = (float*)(memory + Pages::bytes(dh));
        weights = (char*)(scores + CHUNK * COLUMNS);
        queries = (uint32_t*)(weights + CHUNK * 32);
        products = (float*)(queries + dh * 8);
        memset(weights, 0, CHUNK * 32);
    }
};

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

static Reach reach_of(const AttentionStep& s, const Item& w, int64_t column, int64_t count) {
    Reach r;
    int64_t before = s.context_lens[w.sequence] - s.new_tokens(w.sequence);
    r.tree_from = INT32_MAX;
    Column at(column, s.group());
    for (int64_t c = 0; c < COLUMNS; c++, at.next()) {
        int64_t token = c < count ? at.token : column / s.group();
        r.to[c] = (int32_t)(before + token);
        r.from[c] = (int32_t)s.first_seen(before + token);
        uint64_t tree = s.trees ? s.trees[s.query_start[w.sequence] + token] : ~0ull;
        if (~tree) r.tree_from = (int32_t)before;
        r.tree[0][c] = (uint32_t)tree, r.tree[1][c] = (uint32_t)(tree >> 32);
    }
    // Columns are ordered by position, those beyond the last repeat the first.
    r.first = r.from[0], r.all_to = r.to[0];
    r.last = r.to[count - 1], r.all_from = r.from[count - 1];
    return r;
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

static void write_columns(const AttentionStep& s, const Item& w, int64_t block, const State& state) {
    for (int64_t c = 0; c < w.count(block); c++) {
        int64_t flat = w.column + block * COLUMNS + c;
        int64_t token = s.query_start[w.sequence] + flat / s.group();
        bf16* to = (bf16*)s.out + (token * s.q_heads + w.head * s.group() + flat % s.group()) * s.dh;
        for (int64_t d = 0; d < s.dh; d += LANES)
            store(to + d, load(state.out + c * s.dh + d) / state.sum[c]);
    }
}

// One chunk's keys and values for 16 columns; the state of what they see.
static void attend_columns(const AttentionStep& s, Workspace& ws, const Span& span,
                           const Reach& reach, int64_t count, State to) {
    const int64_t dh = s.dh;
    int64_t skipped = reach.first > span.begin ? (reach.first - span.begin) / STEP : 0;
    int64_t needed = (reach.last - span.begin) / STEP + 1;
    if (needed > span.steps()) needed = span.steps();
    int64_t steps = needed - skipped, at = skipped * STEP;
    for (int64_t i = 0; i < steps; i++) {
        const char* const* keys = ws.pages.keys + (skipped + i) * 2;
        ws.ahead.fetch(8);
        score((const bf16*)keys[0], (const bf16*)keys[1], dh, ws.queries,
              ws.scores + i * STEP * 16);
    }
    const bool quantized = s.key_scales;
    auto softmax = count <= FEW ? soften_few : soften;
    softmax(s, ws.scores, steps, span.begin + at, reach,
           quantized ? ws.pages.key_scales + at : nullptr,
           quantized ? ws.pages.value_scales + at : nullptr, ws.weights, ws.ahead, to);
    for (int64_t d = 0; d < dh; d += 64) {
        const char* v = ws.pages.values + skipped * dh * 64 + d / 16 * 1024;
        if (dh - d >= 64) weigh<4>(ws.weights, v, steps, dh, to.out + d);
        else weigh<2>(ws.weights, v, steps, dh, to.out + d);
    }
}

// The positions of an item within the chunk that begins at `chunk`.
static Span span_of(const Item& w, int64_t chunk) {
    Span span;
    span.first = chunk > w.begin ? chunk : w.begin;
    span.begin = span.first / STEP * STEP;
    span.end = chunk + CHUNK < w.end ? chunk + CHUNK : w.end;
    return span;
}

// `next`, if known, is the item that this thread will work on next.
template <class C>
static void attend(const AttentionStep& s, const Item& w, const Item* next, Workspace& ws,
                   float* states) {
    const int64_t dh = s.dh;
    const int32_t* table = s.tables + w.sequence * s.table_stride;
    if (next)
        ws.ahead.begin(s, s.tables + next->sequence * s.table_stride, next->head,
                       span_of(*next, next->begin / CHUNK * CHUNK), sizeof(C));
    bool started[ITEM_COLUMNS / COLUMNS] = {};
    for (int64_t chunk = w.begin / CHUNK * CHUNK; chunk < w.end; chunk += CHUNK) {
        Span span = span_of(w, chunk);
        ready_pages<C>(s, table, w.head, span, ws.pages);
        for (int64_t b = 0; b < w.blocks(); b++) {
            int64_t column = w.column + b * COLUMNS;
            State state(states + b * State::floats(dh));
            Reach reach = reach_of(s, w, column, w.count(b));
            if (reach.last < span.begin || reach.first >= span.end) {
                if (w.state >= 0) clear(state, dh);
                continue;
            }
            pack_queries(s, w, column, w.count(b), ws.queries);
            State part = started[b] ? State(ws.products) : state;
            attend_columns(s, ws, span, reach, w.count(b), part);
            if (started[b]) merge(state, part, dh);
            started[b] = true;
        }
    }
    if (w.state >= 0) return;
    for (int64_t b = 0; b < w.blocks(); b++) write_columns(s, w, b, State(states + b * State::floats(dh)));
}

// Sequences of few columns are split by chunks, so that long contexts keep all threads busy.
static void plan(const AttentionStep& s, std::vector<Item>& items) {
    int64_t states = 0;
    for (int64_t i = 0; i < s.sequences; i++) {
        int64_t context = s.context_lens[i];
        int64_t queries = s.new_tokens(i), columns = queries * s.group();
        bool few = columns <= SHORT_COLUMNS || queries == 1;
        for (int64_t h = 0; h < s.kv_heads; h++)
            for (int64_t c = 0; c < columns; c += ITEM_COLUMNS) {
                int64_t count = columns - c < ITEM_COLUMNS ? columns - c : ITEM_COLUMNS;
                int64_t first = s.first_seen(context - queries + c / s.group());
                int64_t end = context - queries + (c + count - 1) / s.group() + 1;
                int64_t first_chunk = first / CHUNK;
                int64_t parts = few ? (end - 1) / CHUNK - first_chunk + 1 : 1;
                for (int64_t p = 0; p < parts; p++) {
                    int64_t chunk = (first_chunk + p) * CHUNK;
                    int64_t until = p + 1 < parts ? chunk + CHUNK : end;
                    items.push_back({i, h, c, count, p ? chunk : first, until, p ? 0 : parts,
                                     parts > 1 ? states : -1});
                    if (parts > 1) states += (count + COLUMNS - 1) / COLUMNS;
                }
            }
    }
}

template <class C>
static void attend_all(const AttentionStep& step, int threads) {
    const int64_t dh = step.dh;
    static thread_local std::vector<Item> planned;
    planned.clear();
    plan(step, planned);
    const Item* items = planned.data();
    int64_t count = (int64_t)planned.size();
    int64_t state_floats = State::floats(dh);
    int64_t merging = 0, unclaimed = 0;  // states of items that are merged: they outlive them
    for (int64_t i = 0; i < count; i++)
        if (items[i].state >= 0) merging = items[i].state + items[i].blocks();
    float* kept = merging ? (float*)scratch<3>(merging * state_floats * 4) : nullptr;
    if (count == 1) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        configure_tiles(16, 16);
        int64_t own = ITEM_COLUMNS / COLUMNS * state_floats * 4;
        float* states = (float*)scratch<4>(own + Workspace::bytes(dh));
        Workspace ws((char*)states + own, dh);
        // As schedule(dynamic, 1), but a thread claims its next item before it works on a short one.
        auto claim = [&] { return __atomic_fetch_add(&unclaimed, 1, __ATOMIC_RELAXED); };
        for (int64_t i = claim(); i < count;) {
            const Item& w = items[i];
            bool is_short = w.end - w.begin <= CHUNK && w.columns <= SHORT_COLUMNS;
            int64_t next = is_short ? claim() : 0;
            attend<C>(step, w, is_short && next < count ? items + next : nullptr, ws,
                      w.state >= 0 ? kept + w.state * state_floats : states);
            i = is_short ? next : claim();
        }
#pragma omp barrier
        if (merging) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) {
                if (items[i].state < 0 || items[i].parts == 0) continue;
                for (int64_t b = 0; b < items[i].blocks(); b++) {
                    State into(kept + (items[i].state + b) * state_floats);
                    for (int64_t p = 1; p < items[i].parts; p++)
                        merge(into, State(kept + (items[i + p].state + b) * state_floats), dh);
                    write_columns(step, items[i], b, into);
                }
            }
        }
        _tile_release();
    }
}
#endif

// Queries in bf16, the cache in bf16, I8 or E4M3; dh a multiple of 32, at most 256.
EXPORT void amx_attention(int cache_type, const AttentionStep* step, int threads) {
#if AMX_KERNELS
    if (cache_type == I8) attend_all<i8>(*step, threads);
    else if (cache_type == E4M3) attend_all<e4m3>(*step, threads);
    else attend_all<bf16>(*step, threads);
#else
    (void)cache_type, (void)step, (void)threads;
#endif
}
REPLAYABLE(amx_attention)
