// Norms, rotary embedding, gated activation and cache writes: one pass over memory each.
// A single parallel region costs more than a decode step's worth of work, hence PARALLEL_ELEMENTS.
#include "common.h"
#include <cmath>

constexpr int64_t PARALLEL_ELEMENTS = 32768;

template <class T>
static void norm_row(const T* x, T* residual, const T* weight, T* out, int64_t d, float eps) {
    vf sums = splat(0.0f);
    float tail = 0.0f;
    const T* source = x;
    int64_t i = 0;
    if (residual) {
        source = residual;
        for (; i + LANES <= d; i += LANES) {
            store(residual + i, load(x + i) + load(residual + i));
            vf v = load(residual + i);  // the sum as rounded, as the next layer will see it
            sums += v * v;
        }
        for (; i < d; i++) {
            from_float(residual + i, to_float(x[i]) + to_float(residual[i]));
            tail += to_float(residual[i]) * to_float(residual[i]);
        }
    } else {
        for (; i + LANES <= d; i += LANES) {
            vf v = load(x + i);
            sums += v * v;
        }
        for (; i < d; i++) tail += to_float(x[i]) * to_float(x[i]);
    }
    float inverse = 1.0f / sqrtf((reduce_add(sums) + tail) / (float)d + eps);
    // Hugging Face rounds to the model's dtype before the weight; so do we, to stay comparable.
    for (i = 0; i + LANES <= d; i += LANES) {
        store(out + i, load(source + i) * inverse);
        store(out + i, load(out + i) * load(weight + i));
    }
    for (; i < d; i++) {
        from_float(out + i, to_float(source[i]) * inverse);
        from_float(out + i, to_float(out[i]) * to_float(weight[i]));
    }
}

template <class T>
static void norm(const void* x, void* residual, const void* weight, void* out, int64_t rows,
                 int64_t d, int64_t x_stride, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * d > PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; r++)
        norm_row((const T*)x + r * x_stride, residual ? (T*)residual + r * d : nullptr,
                 (const T*)weight, (T*)out + r * d, d, eps);
}

EXPORT void rms_norm(int dtype, const void* x, void* residual, const void* weight, void* out,
                     int64_t rows, int64_t d, int64_t x_stride, float eps, int threads) {
    auto run = dtype == F32 ? norm<float> : dtype == BF16 ? norm<bf16> : norm<f16>;
    run(x, residual, weight, out, rows, d, x_stride, eps, threads);
}

template <class T>
static void rotate_head(T* x, const float* cos_sin, int64_t half) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        vf c = load(cos_sin + i), s = load(cos_sin + half + i);
        vf a = load(x + i), b = load(x + half + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float c = cos_sin[i], s = cos_sin[half + i];
        float a = to_float(x[i]), b = to_float(x[half + i]);
        from_float(x + i, a * c - b * s);
        from_float(x + half + i, b * c + a * s);
    }
}

template <class T>
static void rotate(void* q, void* k, const int64_t* positions, const float* cos_sin,
                   int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t dh, int64_t q_stride,
                   int64_t k_stride, int threads) {
#pragma omp parallel for num_threads(threads) \
    if (tokens * (q_heads + kv_heads) * dh > PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++) {
        const float* angles = cos_sin + positions[t] * dh;
        for (int64_t h = 0; h < q_heads; h++)
            rotate_head((T*)q + t * q_stride + h * dh, angles, dh / 2);
        for (int64_t h = 0; h < kv_heads; h++)
            rotate_head((T*)k + t * k_stride + h * dh, angles, dh / 2);
    }
}

EXPORT void rotary_embedding(int dtype, void* q, void* k, const int64_t* positions,
                             const float* cos_sin, int64_t tokens, int64_t q_heads,
                             int64_t kv_heads, int64_t dh, int64_t q_stride, int64_t k_stride,
                             int threads) {
    auto run = dtype == F32 ? rotate<float> : dtype == BF16 ? rotate<bf16> : rotate<f16>;
    run(q, k, positions, cos_sin, tokens, q_heads, kv_heads, dh, q_stride, k_stride, threads);
}

template <class T>
static void gate(const void* x, void* out, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * n > PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; r++) {
        const T* g = (const T*)x + r * 2 * n;
        const T* u = g + n;
        T* o = (T*)out + r * n;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            vf v = load(g + i);
            store(o + i, v / (1.0f + vexp(-v)));
            store(o + i, load(o + i) * load(u + i));
        }
        for (; i < n; i++) {
            float v = to_float(g[i]);
            from_float(o + i, v / (1.0f + expf(-v)));
            from_float(o + i, to_float(o[i]) * to_float(u[i]));
        }
    }
}

EXPORT void silu_and_mul(int dtype, const void* x, void* out, int64_t rows, int64_t n,
                         int threads) {
    auto run = dtype == F32 ? gate<float> : dtype == BF16 ? gate<bf16> : gate<f16>;
    run(x, out, rows, n, threads);
}

// Strides and head_bytes in bytes: a copy does not care what it copies.
EXPORT void write_kv(const char* k, const char* v, char* key_cache, char* value_cache,
                     const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t block_size,
                     int64_t head_bytes, int64_t k_stride, int64_t v_stride, int threads) {
#pragma omp parallel for num_threads(threads) \
    if (tokens * kv_heads * head_bytes > 4 * PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t at = ((block * kv_heads + h) * block_size + offset) * head_bytes;
            memcpy(key_cache + at, k + t * k_stride + h * head_bytes, head_bytes);
            memcpy(value_cache + at, v + t * v_stride + h * head_bytes, head_bytes);
        }
    }
}
