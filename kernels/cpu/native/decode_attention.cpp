// Decode attention over paged contexts: few queries per sequence, pages read where they lie.
//
// The unit of work is (sequence, kv head, chunk of CHUNK positions). All query heads of a group are
// served by one reading of their keys and values, the sequence's queries by one after another from
// the core's cache. Chunks depend on positions only, never on the batch or the number of threads,
// and are merged in order: a query's result is bit-identical whatever it is batched with, drafted
// tokens before it among them. A window's first chunk begins where the window does. Softmax merging
// as in Flash-Decoding (partial max, sum, weighted sum).
#include "attention_step.h"
#include "kv_formats.h"
#include "replay.h"
#include <cmath>
#include <vector>

constexpr int64_t CHUNK = 256;

struct Partial {
    float* max;  // [group]
    float* sum;  // [group]
    float* out;  // [group, dh]

    static int64_t floats(const AttentionStep& s) { return s.group() * (s.dh + 2); }
    Partial(const AttentionStep& s, float* at)
        : max(at), sum(at + s.group()), out(at + 2 * s.group()) {}
};

// scores[h][i] += q[h] . k[i] over NV vectors of the head dimension, for H heads.
template <class T, int H, int NV>
static void add_scores(const float* q, int64_t q_stride, const T* k, int64_t dh, int64_t keys,
                       float* scores) {
    vf qv[H][NV];
    for (int h = 0; h < H; h++)
        for (int v = 0; v < NV; v++) qv[h][v] = load(q + h * q_stride + v * LANES);
    for (int64_t i = 0; i < keys; i++) {
        vf kv[NV];
        for (int v = 0; v < NV; v++) kv[v] = load(k + i * dh + v * LANES);
        for (int h = 0; h < H; h++) {
            vf acc = qv[h][0] * kv[0];
            for (int v = 1; v < NV; v++) acc += qv[h][v] * kv[v];
            scores[h * CHUNK + i] += reduce_add(acc);
        }
    }
}

// out[h] += sum_i p[h][i] * v[i] over NV vectors of the head dimension, for H heads.
template <class T, int H, int NV>
static void add_values(const float* p, const T* v, int64_t dh, int64_t keys, float* out) {
    vf acc[H][NV];
    for (int h = 0; h < H; h++)
        for (int n = 0; n < NV; n++) acc[h][n] = load(out + h * dh + n * LANES);
    for (int64_t i = 0; i < keys; i++) {
        vf vv[NV];
        for (int n = 0; n < NV; n++) vv[n] = load(v + i * dh + n * LANES);
        for (int h = 0; h < H; h++)
            for (int n = 0; n < NV; n++) acc[h][n] += p[h * CHUNK + i] * vv[n];
    }
    for (int h = 0; h < H; h++)
        for (int n = 0; n < NV; n++) store(out + h * dh + n * LANES, acc[h][n]);
}

template <class T, int H>
static void scores_of(int nv, const float* q, int64_t qs, const T* k, int64_t dh, int64_t n,
                      float* s) {
    if (nv == 4) add_scores<T, H, 4>(q, qs, k, dh, n, s);
    else if (nv == 3) add_scores<T, H, 3>(q, qs, k, dh, n, s);
    else if (nv == 2) add_scores<T, H, 2>(q, qs, k, dh, n, s);
    else add_scores<T, H, 1>(q, qs, k, dh, n, s);
}
template <class T, int H>
static void values_of(int nv, const float* p, const T* v, int64_t dh, int64_t n, float* out) {
    if (nv == 4) add_values<T, H, 4>(p, v, dh, n, out);
    else if (nv == 3) add_values<T, H, 3>(p, v, dh, n, out);
    else if (nv == 2) add_values<T, H, 2>(p, v, dh, n, out);
    else add_values<T, H, 1>(p, v, dh, n, out);
}

// Scores of drafted tokens that a tree hides from this one; `first` is the first new position.
static void hide(uint64_t tree, int64_t first, int64_t begin, int64_t end, float* scores) {
    for (int64_t at = begin > first ? begin : first; at < end && at < first + 64; at++)
        if (!(tree >> (at - first) & 1)) scores[at - begin] = -INFINITY;
}

// Positions [begin, end) of one kv head of one sequence, for all query heads of its group, of the
// query that is its `nth` new token.
template <class T, class C>
static void attend_chunk(const AttentionStep& s, int64_t sequence, int64_t nth, int64_t head,
                         int64_t begin, int64_t end, Partial to) {
    const int64_t group = s.group(), dh = s.dh, count = end - begin;
    const int64_t token = s.query_start[sequence] + nth;
    const T* q = (const T*)s.q + token * s.q_stride + head * group * dh;
    const int32_t* table = s.tables + sequence * s.table_stride;
    static thread_local std::vector<float> scratch;
    scratch.assign(group * (dh + CHUNK), 0.0f);
    float* wide = scratch.data();       // [group, dh] the queries, scaled
    float* scores = wide + group * dh;  // [group, CHUNK]
    for (int64_t i = 0; i < group * dh; i++) wide[i] = to_float(q[i]) * s.scale;
    for (int64_t i = 0; i < group * dh; i++) to.out[i] = 0.0f;

    // Runs of rows that lie in one page: the first one's number, how many, and where in the chunk.
    auto pages = [&](auto&& visit) {
        for (int64_t at = begin; at < end;) {
            int64_t offset = at % s.block_size;
            int64_t keys = s.block_size - offset < end - at ? s.block_size - offset : end - at;
            visit((table[at / s.block_size] * s.kv_heads + head) * s.block_size + offset, keys,
                  at - begin);
            at += keys;
        }
    };
    auto multiply = [&](const float* scales) {
        pages([&](int64_t row, int64_t keys, int64_t at) {
            for (int64_t h = 0; h < group; h++)
                for (int64_t i = 0; i < keys; i++) scores[h * CHUNK + at + i] *= scales[row + i];
        });
    };
    pages([&](int64_t row, int64_t keys, int64_t at) {
        const C* rows = (const C*)s.keys + row * dh;
        for (int64_t h = 0; h < group; h += 4)
            for (int64_t d = 0; d < dh; d += 64) {
                int nv = dh - d >= 64 ? 4 : (int)((dh - d) / LANES);
                const float* qh = wide + h * dh + d;
                float* to_scores = scores + h * CHUNK + at;
                switch (group - h) {
                    case 1: scores_of<C, 1>(nv, qh, dh, rows + d, dh, keys, to_scores); break;
                    case 2: scores_of<C, 2>(nv, qh, dh, rows + d, dh, keys, to_scores); break;
                    case 3: scores_of<C, 3>(nv, qh, dh, rows + d, dh, keys, to_scores); break;
                    default: scores_of<C, 4>(nv, qh, dh, rows + d, dh, keys, to_scores);
                }
            }
    });
    if (s.key_scales) multiply(s.key_scales);
    for (int64_t h = 0; h < group; h++) {
        float* row = scores + h * CHUNK;
        if (s.soft_cap)
            for (int64_t i = 0; i < count; i += LANES)
                store(row + i, s.soft_cap * vtanh(load(row + i) / s.soft_cap));
        if (s.trees && ~s.trees[token])
            hide(s.trees[token], s.context_lens[sequence] - s.new_tokens(sequence), begin, end, row);
        for (int64_t i = count; i % LANES; i++) row[i] = -INFINITY;
        vf best = splat(-INFINITY);
        for (int64_t i = 0; i < count; i += LANES) best = vmax(load(row + i), best);
        to.max[h] = reduce_max(best);
        float finite = to.max[h] == -INFINITY ? 0.0f : to.max[h];
        vf sum = splat(0.0f);
        for (int64_t i = 0; i < count; i += LANES) {
            vf p = vexp(load(row + i) - finite);
            store(row + i, p);
            sum += p;
        }
        to.sum[h] = reduce_add(sum);
    }
    if (s.value_scales) multiply(s.value_scales);
    pages([&](int64_t row, int64_t keys, int64_t at) {
        const C* rows = (const C*)s.values + row * dh;
        for (int64_t h = 0; h < group; h += 4)
            for (int64_t d = 0; d < dh; d += 64) {
                int nv = dh - d >= 64 ? 4 : (int)((dh - d) / LANES);
                const float* p = scores + h * CHUNK + at;
                float* o = to.out + h * dh + d;
                switch (group - h) {
                    case 1: values_of<C, 1>(nv, p, rows + d, dh, keys, o); break;
                    case 2: values_of<C, 2>(nv, p, rows + d, dh, keys, o); break;
                    case 3: values_of<C, 3>(nv, p, rows + d, dh, keys, o); break;
                    default: values_of<C, 4>(nv, p, rows + d, dh, keys, o);
                }
            }
    });
}

template <class T>
static void merge(const Partial* parts, int64_t count, int64_t group, int64_t dh, T* out) {
    for (int64_t h = 0; h < group; h++) {
        float best = -INFINITY, sum = 0.0f;
        for (int64_t c = 0; c < count; c++) best = parts[c].max[h] > best ? parts[c].max[h] : best;
        for (int64_t c = 0; c < count; c++) sum += parts[c].sum[h] * expf(parts[c].max[h] - best);
        for (int64_t d = 0; d < dh; d += LANES) {
            vf acc = splat(0.0f);
            for (int64_t c = 0; c < count; c++)
                acc += load(parts[c].out + h * dh + d) * expf(parts[c].max[h] - best);
            store(out + h * dh + d, acc / sum);
        }
    }
}

template <class T, class C>
static void decode(const AttentionStep& s, int threads) {
    struct Item {
        int64_t sequence, head, begin, end;
        int64_t parts;    // > 0: this is the first of so many chunks of its sequence and head
        int64_t partial;  // number of its first query's Partial
    };
    const int64_t group = s.group(), dh = s.dh;
    static thread_local std::vector<Item> items_kept;
    static thread_local std::vector<float> partials_kept;
    items_kept.clear();
    int64_t partial = 0;
    for (int64_t i = 0; i < s.sequences; i++) {
        int64_t context = s.context_lens[i], queries = s.new_tokens(i);
        if (queries > s.most_new) continue;
        int64_t first = s.first_seen(context - queries);
        int64_t parts = (context - 1) / CHUNK - first / CHUNK + 1;
        for (int64_t h = 0; h < s.kv_heads; h++)
            for (int64_t at = first; at < context; at = (at / CHUNK + 1) * CHUNK) {
                int64_t next = (at / CHUNK + 1) * CHUNK;
                items_kept.push_back({i, h, at, next < context ? next : context,
                                      at == first ? parts : 0, partial});
                partial += queries;
            }
    }
    partials_kept.resize(partial * Partial::floats(s));
    // A thread_local named inside the region would be each worker's own, hence these copies.
    const Item* items = items_kept.data();
    float* partials = partials_kept.data();
    int64_t count = (int64_t)items_kept.size();
    auto part = [=](int64_t i) { return Partial(s, partials + i * Partial::floats(s)); };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            const Item& w = items[i];
            int64_t queries = s.new_tokens(w.sequence), before = s.context_lens[w.sequence] - queries;
            for (int64_t q = 0; q < queries; q++) {
                int64_t seen = s.first_seen(before + q);
                int64_t begin = seen > w.begin ? seen : w.begin;
                int64_t end = before + q + 1 < w.end ? before + q + 1 : w.end;
                Partial to = part(w.partial + q);
                if (begin < end) {
                    attend_chunk<T, C>(s, w.sequence, q, w.head, begin, end, to);
                    continue;
                }
                for (int64_t h = 0; h < group; h++) to.max[h] = -INFINITY, to.sum[h] = 0.0f;
                for (int64_t d = 0; d < group * dh; d++) to.out[d] = 0.0f;
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            const Item& w = items[i];
            int64_t queries = s.new_tokens(w.sequence);
            std::vector<Partial> parts;
            for (int64_t q = 0; w.parts && q < queries; q++) {
                parts.clear();
                for (int64_t p = 0; p < w.parts; p++) parts.push_back(part(items[i + p].partial + q));
                int64_t token = s.query_start[w.sequence] + q;
                merge(parts.data(), w.parts, group, dh,
                      (T*)s.out + (token * s.q_heads + w.head * group) * dh);
            }
        }
    }
}

template <class T>
static void decode_from(int cache_type, const AttentionStep& s, int threads) {
    if (cache_type == I8) decode<T, i8>(s, threads);
    else if (cache_type == E4M3) decode<T, e4m3>(s, threads);
    else decode<T, T>(s, threads);
}

// The cache is of the queries' dtype, I8 or E4M3; dh a multiple of LANES.
EXPORT void decode_attention(int dtype, int cache_type, const AttentionStep* step, int threads) {
    auto run = dtype == F32 ? decode_from<float> : dtype == BF16 ? decode_from<bf16> : decode_from<f16>;
    run(cache_type, *step, threads);
}
REPLAYABLE(decode_attention)
