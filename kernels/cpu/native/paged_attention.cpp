// Attention over paged contexts on CPUs without tiles: decodes, verified drafts and prompt chunks.
//
// All queries of a sequence that share a kv head, of new tokens as of heads, are the rows of two
// small matmuls. Keys of some positions are widened and transposed once and multiplied by every row,
// as are values; so what reading a context costs is shared by the rows, and drafted tokens cost
// little more than their arithmetic.
//
// Partial results of chunks of CHUNK positions are merged in order, as in Flash-Decoding (a maximum,
// a sum, a weighted sum), whether one thread comes by all chunks or each is another's. Where chunks
// begin hangs on positions alone, and every sum runs over them in one order: a query's result is
// bit-identical whatever it is batched with. What a query does not see weighs 0 exactly, as long as
// the values of other new tokens of its sequence are numbers.
#include "attention_step.h"
#include "kv_formats.h"
#include "replay.h"
#include "thread_scratch.h"
#include <cmath>
#include <vector>

constexpr int64_t CHUNK = 256;
// Positions whose scores, and elements of a head whose values, are summed in registers.
constexpr int64_t STRIP = 16;
constexpr int PER_STRIP = STRIP / LANES;
// What parts of items keep, in floats, together; beyond that they are left whole.
constexpr int64_t MOST_KEPT = 16 << 20;
// Rows of an item, unless one token has more heads; and those that are multiplied at once.
constexpr int64_t MOST_ROWS = 96;
constexpr int MANY = LANES == 16 ? 12 : 6;
// Rows of scores would else lie a multiple of a page apart, in the same few lines of the cache.
constexpr int64_t SCORES = CHUNK + STRIP;

// Queries [first, first + queries) of a sequence for one kv head, over positions [begin, end). Where
// that is one of several parts, what it finds is kept, in floats from `kept` on, and then merged.
struct Item {
    int64_t sequence, head, first, queries, begin, end;
    int64_t part, parts, kept;
};

// What rows have found so far.
struct Found {
    float* max;  // [rows]
    float* sum;  // [rows]
    float* out;  // [rows, dh]

    static int64_t floats(int64_t rows, int64_t dh) { return rows * (dh + 2); }
    Found(float* at, int64_t rows) : max(at), sum(at + rows), out(at + 2 * rows) {}

    void clear(int64_t rows, int64_t dh) {
        for (int64_t r = 0; r < rows; r++) max[r] = -INFINITY, sum[r] = 0.0f;
        memset(out, 0, rows * dh * sizeof(float));
    }
    // Take in what was found behind it.
    void merge(const Found& next, int64_t rows, int64_t dh) {
        for (int64_t r = 0; r < rows; r++) {
            if (next.sum[r] == 0.0f) continue;  // all hidden; NaN goes on
            float best = max[r] > next.max[r] ? max[r] : next.max[r];
            float mine = expf(max[r] - best), theirs = expf(next.max[r] - best);
            max[r] = best;
            sum[r] = sum[r] * mine + next.sum[r] * theirs;
            for (int64_t d = r * dh; d < (r + 1) * dh; d += LANES)
                store(out + d, load(out + d) * mine + load(next.out + d) * theirs);
        }
    }
};

// c [ROWS, STRIP] = a [ROWS, depth] by b [depth, STRIP]; strides in elements.
template <int ROWS>
static inline void block(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c,
                         int64_t c_stride) {
    vf sums[ROWS][PER_STRIP] = {};
    for (int64_t k = 0; k < depth; k++) {
        vf line[PER_STRIP];
        for (int v = 0; v < PER_STRIP; v++) line[v] = load(b + k * STRIP + v * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < PER_STRIP; v++) sums[r][v] += a[r * a_stride + k] * line[v];
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < PER_STRIP; v++) store(c + r * c_stride + v * LANES, sums[r][v]);
}

template <int ROWS>
static void of_rows(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t depth,
                    float* c, int64_t c_stride) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return of_rows<ROWS - 1>(rows, a, a_stride, b, depth, c, c_stride);
    block<ROWS>(a, a_stride, b, depth, c, c_stride);
}

// The same of any number of rows.
static void multiply(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t depth,
                     float* c, int64_t c_stride) {
    for (int64_t r = 0; r < rows; r += MANY)
        of_rows<MANY>(rows - r < MANY ? rows - r : MANY, a + r * a_stride, a_stride, b, depth,
                      c + r * c_stride, c_stride);
}

// Memory of a thread while it computes an item.
struct Room {
    float *q, *scores, *wide, *strip;  // [rows, dh], [rows, SCORES], [STRIP, dh], [dh, STRIP]
    float* values;                     // [CHUNK, STRIP]
    Found found, chunk;

    static Room of(int64_t rows, int64_t dh) {
        const int64_t found = Found::floats(rows, dh);
        float* q = (float*)scratch<0>(
            (rows * (dh + SCORES) + STRIP * (2 * dh + CHUNK) + 2 * found) * sizeof(float));
        float *scores = q + rows * dh, *wide = scores + rows * SCORES, *strip = wide + STRIP * dh;
        float *values = strip + STRIP * dh, *kept = values + STRIP * CHUNK;
        return {q, scores, wide, strip, values, Found(kept, rows), Found(kept + found, rows)};
    }
};

// Rows of the cache of positions [from, to). For those outside of [begin, end) that are next to them:
// what nobody sees weighs 0, and must be a number.
static void list_rows(const AttentionStep& s, const Item& w, int64_t from, int64_t begin,
                      int64_t end, int64_t to, int64_t* rows) {
    const int32_t* table = s.tables + w.sequence * s.table_stride;
    for (int64_t i = begin; i < end;) {
        int64_t page = i / s.block_size, next = (page + 1) * s.block_size;
        int64_t row = (table[page] * s.kv_heads + w.head) * s.block_size + i % s.block_size;
        for (; i < next && i < end; i++) rows[i - from] = row++;
    }
    for (int64_t i = from; i < begin; i++) rows[i - from] = rows[begin - from];
    for (int64_t i = end; i < to; i++) rows[i - from] = rows[end - 1 - from];
}

// Elements of some rows of a cache, in float32: [count, elements]; rows are `dh` apart.
template <class C>
static void widen(const C* cache, const int64_t* at, int64_t count, int64_t dh, int64_t elements,
                  float* to) {
    for (int64_t i = 0; i < count; i++, to += elements)
        for (int64_t d = 0; d < elements; d += LANES) store(to + d, load(cache + at[i] * dh + d));
}

// A strip's rows of a cache are wanted soon.
template <class C>
static void fetch(const C* cache, const int64_t* at, int64_t dh) {
    for (int64_t i = 0; i < STRIP; i++)
        for (int64_t d = 0; d < dh; d += 64 / (int64_t)sizeof(C))
            __builtin_prefetch(cache + at[i] * dh + d);
}

// [STRIP, dh] -> [dh, STRIP]
static void transpose(const float* from, int64_t dh, float* to) {
#if defined(__AVX__)
    for (int64_t d = 0; d < dh; d += 8)
        for (int64_t i = 0; i < STRIP; i += 8) {
            __m256 a[8], b[8];
            for (int k = 0; k < 8; k++) a[k] = _mm256_loadu_ps(from + (i + k) * dh + d);
            for (int k = 0; k < 8; k += 2) {
                b[k] = _mm256_unpacklo_ps(a[k], a[k + 1]);
                b[k + 1] = _mm256_unpackhi_ps(a[k], a[k + 1]);
            }
            for (int k = 0; k < 8; k += 4)
                for (int h = 0; h < 2; h++) {
                    a[k + 2 * h] = _mm256_shuffle_ps(b[k + h], b[k + h + 2], 0x44);
                    a[k + 2 * h + 1] = _mm256_shuffle_ps(b[k + h], b[k + h + 2], 0xee);
                }
            for (int k = 0; k < 4; k++) {
                float* line = to + (d + k) * STRIP + i;
                _mm256_storeu_ps(line, _mm256_permute2f128_ps(a[k], a[k + 4], 0x20));
                _mm256_storeu_ps(line + 4 * STRIP, _mm256_permute2f128_ps(a[k], a[k + 4], 0x31));
            }
        }
#else
    for (int64_t d = 0; d < dh; d++)
        for (int64_t i = 0; i < STRIP; i++) to[d * STRIP + i] = from[i * dh + d];
#endif
}

// The queries in float32, scaled: [queries, group, dh].
template <class T>
static void widen_queries(const AttentionStep& s, const Item& w, float* to) {
    const int64_t group = s.group(), token = s.query_start[w.sequence] + w.first;
    for (int64_t q = 0; q < w.queries; q++) {
        const T* from = (const T*)s.q + (token + q) * s.q_stride + w.head * group * s.dh;
        for (int64_t i = 0; i < group * s.dh; i += LANES)
            store(to + q * group * s.dh + i, load(from + i) * s.scale);
    }
}

// What a query does not see of the scores [from, to) of positions from `base` on.
static void hide(const AttentionStep& s, const Item& w, int64_t query, int64_t base, int64_t from,
                 int64_t to, float* scores) {
    const int64_t nth = w.first + query, token = s.query_start[w.sequence] + nth;
    const int64_t before = s.context_lens[w.sequence] - s.new_tokens(w.sequence);
    int64_t first = s.first_seen(before + nth) - base, last = before + nth - base;
    for (int64_t i = from; i < to && i < first; i++) scores[i] = -INFINITY;
    for (int64_t i = last + 1 > from ? last + 1 : from; i < to; i++) scores[i] = -INFINITY;
    if (!s.trees || !~s.trees[token]) return;
    const uint64_t tree = s.trees[token];
    for (int64_t i = before > base + from ? before - base : from; i < to && base + i < before + 64;
         i++)
        if (!(tree >> (base + i - before) & 1)) scores[i] = -INFINITY;
}

// Scores [from, to) of a row become their exponentials; their maximum and sum are the row's.
static void exponentials(int64_t from, int64_t to, float* scores, float& max, float& sum) {
    vf best = splat(-INFINITY);
    for (int64_t i = from; i < to; i += LANES) best = vmax(load(scores + i), best);
    max = reduce_max(best);
    float finite = max == -INFINITY ? 0.0f : max;
    vf total = splat(0.0f);
    for (int64_t i = from; i < to; i += LANES) {
        vf p = vexp(load(scores + i) - finite);
        store(scores + i, p);
        total += p;
    }
    sum = reduce_add(total);
}

// All rows over the positions [begin, end) of one chunk, into `room.chunk`.
template <class C>
static void attend(const AttentionStep& s, const Item& w, int64_t begin, int64_t end,
                   const Room& room) {
    const Found& to = room.chunk;
    const int64_t group = s.group(), dh = s.dh, rows = w.queries * group;
    const int64_t base = begin / CHUNK * CHUNK, from = (begin - base) / STRIP * STRIP;
    const int64_t stop = (end - base + STRIP - 1) / STRIP * STRIP;
    int64_t at[CHUNK];  // rows of the cache
    list_rows(s, w, base + from, begin, end, base + stop, at + from);
    const C *keys = (const C*)s.keys, *values = (const C*)s.values;
    for (int64_t i = from; i < stop; i += STRIP) {
        if (i + STRIP < stop) fetch(keys, at + i + STRIP, dh);
        fetch(values, at + i, dh);
        widen(keys, at + i, STRIP, dh, dh, room.wide);
        transpose(room.wide, dh, room.strip);
        multiply(rows, room.q, dh, room.strip, dh, room.scores + i, SCORES);
    }
    float scales[CHUNK];
    auto scale_by = [&](const float* each) {
        for (int64_t i = from; i < stop; i++) scales[i] = each[at[i]];
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = from; i < stop; i += LANES)
                store(room.scores + r * SCORES + i,
                      load(room.scores + r * SCORES + i) * load(scales + i));
    };
    if (s.key_scales) scale_by(s.key_scales);
    for (int64_t r = 0; r < rows; r++) {
        float* scores = room.scores + r * SCORES;
        if (s.soft_cap)
            for (int64_t i = from; i < stop; i += LANES)
                store(scores + i, s.soft_cap * vtanh(load(scores + i) / s.soft_cap));
        hide(s, w, r / group, base, from, stop, scores);
        exponentials(from, stop, scores, to.max[r], to.sum[r]);
    }
    if (s.value_scales) scale_by(s.value_scales);
    for (int64_t d = 0; d < dh; d += STRIP) {
        widen(values + d, at + from, stop - from, dh, STRIP, room.values);
        multiply(rows, room.scores + from, SCORES, room.values, stop - from, to.out + d, dh);
    }
}

template <class T>
static void write(const AttentionStep& s, const Item& w, const Found& found) {
    const int64_t group = s.group(), dh = s.dh;
    for (int64_t q = 0; q < w.queries; q++) {
        int64_t token = s.query_start[w.sequence] + w.first + q;
        T* to = (T*)s.out + (token * s.q_heads + w.head * group) * dh;
        for (int64_t h = 0; h < group; h++) {
            int64_t r = q * group + h;
            for (int64_t d = 0; d < dh; d += LANES)
                store(to + h * dh + d, load(found.out + r * dh + d) / found.sum[r]);
        }
    }
}

// The items of a step; beside them, the floats that parts keep. Those that are long beside what each
// thread has to do are split by chunks.
static int64_t list(const AttentionStep& s, int threads, std::vector<Item>& items) {
    const int64_t group = s.group(), most = group < MOST_ROWS ? MOST_ROWS / group : 1;
    int64_t work = 0, kept = 0;  // in pairs of query and position
    for (int64_t i = 0; i < s.sequences; i++) {
        int64_t queries = s.new_tokens(i), begin = s.first_seen(s.context_lens[i] - queries);
        work += s.kv_heads * queries * (s.context_lens[i] - begin);
    }
    const int64_t longest = threads > 1 ? work / (4 * threads) : work;
    items.clear();
    for (int64_t i = 0; i < s.sequences; i++) {
        const int64_t queries = s.new_tokens(i), before = s.context_lens[i] - queries;
        // The last ones see most, and take longest.
        for (int64_t first = (queries - 1) / most * most; first >= 0; first -= most)
            for (int64_t head = 0; head < s.kv_heads; head++) {
                int64_t count = queries - first < most ? queries - first : most;
                int64_t begin = s.first_seen(before + first), end = before + first + count;
                int64_t parts = (end - 1) / CHUNK - begin / CHUNK + 1;
                int64_t floats = parts > 1 ? parts * Found::floats(count * group, s.dh) : 0;
                if (count * (end - begin) <= longest || kept + floats > MOST_KEPT) parts = 1;
                for (int64_t part = 0; part < parts; part++) {
                    int64_t next = (begin / CHUNK + 1) * CHUNK;
                    int64_t stop = part == parts - 1 ? end : next;
                    items.push_back({i, head, first, count, begin, stop, part, parts, kept});
                    if (parts > 1) kept += Found::floats(count * group, s.dh);
                    begin = next;
                }
            }
    }
    return kept;
}

template <class T, class C>
static void run(const AttentionStep& s, int threads) {
    static thread_local std::vector<Item> listed;
    float* kept = (float*)scratch<1>(list(s, threads, listed) * sizeof(float));
    // A thread_local named inside the region would be each worker's own, hence these copies.
    const Item* items = listed.data();
    const int64_t count = (int64_t)listed.size(), dh = s.dh;
    auto rows_of = [&](const Item& w) { return w.queries * s.group(); };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            const Item& w = items[i];
            const int64_t rows = rows_of(w);
            Room room = Room::of(rows, dh);
            Found found = w.parts > 1 ? Found(kept + w.kept, rows) : room.found;
            widen_queries<T>(s, w, room.q);
            found.clear(rows, dh);
            for (int64_t begin = w.begin; begin < w.end; begin = (begin / CHUNK + 1) * CHUNK) {
                int64_t next = (begin / CHUNK + 1) * CHUNK;
                attend<C>(s, w, begin, next < w.end ? next : w.end, room);
                found.merge(room.chunk, rows, dh);
            }
            if (w.parts == 1) write<T>(s, w, found);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            const Item& w = items[i];
            if (w.part || w.parts == 1) continue;
            const int64_t rows = rows_of(w);
            Found found(kept + w.kept, rows);
            for (int64_t part = 1; part < w.parts; part++)
                found.merge(Found(kept + items[i + part].kept, rows), rows, dh);
            write<T>(s, w, found);
        }
    }
}

template <class T>
static void of_cache(int cache_type, const AttentionStep& s, int threads) {
    if (cache_type == I8) run<T, i8>(s, threads);
    else if (cache_type == E4M3) run<T, e4m3>(s, threads);
    else run<T, T>(s, threads);
}

// The cache is of the queries' dtype, I8 or E4M3; dh a multiple of STRIP.
EXPORT void paged_attention(int dtype, int cache_type, const AttentionStep* step, int threads) {
    auto go = dtype == F32 ? of_cache<float> : dtype == BF16 ? of_cache<bf16> : of_cache<f16>;
    go(cache_type, *step, threads);
}
REPLAYABLE(paged_attention)
