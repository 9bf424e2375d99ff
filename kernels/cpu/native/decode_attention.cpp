// Decode attention over paged contexts: one query per sequence, pages read where they lie.
//
// The unit of work is (sequence, kv head, chunk of CHUNK positions). All query heads of a group are
// served by one reading of their keys and values. Chunks depend on positions only, never on the
// batch or the number of threads, and are merged in order: a sequence's result is bit-identical
// whatever it is batched with. Softmax merging as in Flash-Decoding (partial max, sum, weighted sum).
#include "common.h"
#include <cmath>
#include <vector>

constexpr int64_t CHUNK = 256;

struct Partial {
    float* max;  // [group]
    float* sum;  // [group]
    float* out;  // [group, dh]
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

template <class T>
static void attend_chunk(const T* q, const T* key_cache, const T* value_cache, const int32_t* table,
                         int64_t begin, int64_t end, int64_t head, int64_t kv_heads, int64_t group,
                         int64_t block_size, int64_t dh, float scale, Partial to) {
    static thread_local std::vector<float> scratch;
    scratch.assign(group * (dh + CHUNK), 0.0f);
    float* wide = scratch.data();          // [group, dh] the queries, scaled
    float* scores = wide + group * dh;     // [group, CHUNK]
    for (int64_t i = 0; i < group * dh; i++) wide[i] = to_float(q[i]) * scale;
    for (int64_t i = 0; i < group * dh; i++) to.out[i] = 0.0f;

    auto pages = [&](const T* cache, auto&& visit) {
        for (int64_t at = begin; at < end;) {
            int64_t offset = at % block_size;
            int64_t keys = block_size - offset < end - at ? block_size - offset : end - at;
            const T* rows =
                cache + ((table[at / block_size] * kv_heads + head) * block_size + offset) * dh;
            visit(rows, keys, at - begin);
            at += keys;
        }
    };
    pages(key_cache, [&](const T* rows, int64_t keys, int64_t at) {
        for (int64_t h = 0; h < group; h += 4)
            for (int64_t d = 0; d < dh; d += 64) {
                int nv = dh - d >= 64 ? 4 : (int)((dh - d) / LANES);
                const float* qh = wide + h * dh + d;
                float* s = scores + h * CHUNK + at;
                switch (group - h) {
                    case 1: scores_of<T, 1>(nv, qh, dh, rows + d, dh, keys, s); break;
                    case 2: scores_of<T, 2>(nv, qh, dh, rows + d, dh, keys, s); break;
                    case 3: scores_of<T, 3>(nv, qh, dh, rows + d, dh, keys, s); break;
                    default: scores_of<T, 4>(nv, qh, dh, rows + d, dh, keys, s);
                }
            }
    });
    int64_t count = end - begin;
    for (int64_t h = 0; h < group; h++) {
        float* s = scores + h * CHUNK;
        for (int64_t i = count; i % LANES; i++) s[i] = -INFINITY;
        vf best = splat(-INFINITY);
        for (int64_t i = 0; i < count; i += LANES) best = vmax(load(s + i), best);
        to.max[h] = reduce_max(best);
        vf sum = splat(0.0f);
        for (int64_t i = 0; i < count; i += LANES) {
            vf p = vexp(load(s + i) - to.max[h]);
            store(s + i, p);
            sum += p;
        }
        to.sum[h] = reduce_add(sum);
    }
    pages(value_cache, [&](const T* rows, int64_t keys, int64_t at) {
        for (int64_t h = 0; h < group; h += 4)
            for (int64_t d = 0; d < dh; d += 64) {
                int nv = dh - d >= 64 ? 4 : (int)((dh - d) / LANES);
                const float* p = scores + h * CHUNK + at;
                float* o = to.out + h * dh + d;
                switch (group - h) {
                    case 1: values_of<T, 1>(nv, p, rows + d, dh, keys, o); break;
                    case 2: values_of<T, 2>(nv, p, rows + d, dh, keys, o); break;
                    case 3: values_of<T, 3>(nv, p, rows + d, dh, keys, o); break;
                    default: values_of<T, 4>(nv, p, rows + d, dh, keys, o);
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

template <class T>
static void decode(const void* q, const void* key_cache, const void* value_cache,
                   const int32_t* tables, int64_t table_stride, const int32_t* context_lens,
                   void* out, int64_t sequences, int64_t q_heads, int64_t kv_heads,
                   int64_t block_size, int64_t dh, int64_t q_stride, float scale, int threads) {
    struct Item {
        int64_t sequence, head, begin, end, first_part;
    };
    int64_t group = q_heads / kv_heads;
    static thread_local std::vector<Item> items_kept;
    static thread_local std::vector<float> partials_kept;
    items_kept.clear();
    for (int64_t s = 0; s < sequences; s++)
        for (int64_t h = 0; h < kv_heads; h++)
            for (int64_t at = 0; at < context_lens[s]; at += CHUNK)
                items_kept.push_back(
                    {s, h, at, at + CHUNK < context_lens[s] ? at + CHUNK : context_lens[s],
                     (int64_t)items_kept.size() - at / CHUNK});
    partials_kept.resize(items_kept.size() * group * (dh + 2));
    // A thread_local named inside the region would be each worker's own, hence these copies.
    const Item* items = items_kept.data();
    float* partials = partials_kept.data();
    int64_t count = (int64_t)items_kept.size();
    auto part = [=](int64_t i) {
        float* base = partials + i * group * (dh + 2);
        return Partial{base, base + group, base + 2 * group};
    };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            const Item& w = items[i];
            attend_chunk((const T*)q + w.sequence * q_stride + w.head * group * dh,
                         (const T*)key_cache, (const T*)value_cache,
                         tables + w.sequence * table_stride, w.begin, w.end, w.head, kv_heads,
                         group, block_size, dh, scale, part(i));
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            const Item& w = items[i];
            if (w.begin) continue;
            std::vector<Partial> parts;
            for (int64_t at = 0; at < context_lens[w.sequence]; at += CHUNK)
                parts.push_back(part(i + at / CHUNK));
            merge(parts.data(), (int64_t)parts.size(), group, dh,
                  (T*)out + (w.sequence * q_heads + w.head * group) * dh);
        }
    }
}

EXPORT void decode_attention(int dtype, const void* q, const void* key_cache,
                             const void* value_cache, const int32_t* tables, int64_t table_stride,
                             const int32_t* context_lens, void* out, int64_t sequences,
                             int64_t q_heads, int64_t kv_heads, int64_t block_size, int64_t dh,
                             int64_t q_stride, float scale, int threads) {
    auto run = dtype == F32 ? decode<float> : dtype == BF16 ? decode<bf16> : decode<f16>;
    run(q, key_cache, value_cache, tables, table_stride, context_lens, out, sequences, q_heads,
        kv_heads, block_size, dh, q_stride, scale, threads);
}
