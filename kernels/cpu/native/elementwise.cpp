// Norms, rotary embedding, gated activations and cache writes: one pass over memory each.
// A single parallel region costs more than a decode step's worth of work, hence PARALLEL_ELEMENTS.
#include "kv_formats.h"
#include "replay.h"
#include <cmath>
#include <type_traits>

constexpr int64_t PARALLEL_ELEMENTS = 32768;

// `out` may be x itself. A weight of T multiplies what was rounded to T, a wider one does before.
template <class T, class W>
static void norm_row(const T* x, T* residual, const W* weight, T* out, int64_t d, float eps) {
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
    // Hugging Face's Llama rounds to the model's dtype before the weight, its Gemma after it; so do
    // we, to stay comparable.
    constexpr bool ROUNDS_FIRST = std::is_same<T, W>::value;
    for (i = 0; i + LANES <= d; i += LANES) {
        vf v = load(source + i) * inverse;
        if (ROUNDS_FIRST) {
            store(out + i, v);
            v = load(out + i);
        }
        store(out + i, v * load(weight + i));
    }
    for (; i < d; i++) {
        float v = to_float(source[i]) * inverse;
        if (ROUNDS_FIRST) {
            from_float(out + i, v);
            v = to_float(out[i]);
        }
        from_float(out + i, v * to_float(weight[i]));
    }
}

template <class T, class W>
static void norm(const void* x, void* residual, const void* weight, void* out, int64_t rows,
                 int64_t d, int64_t x_stride, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * d > PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; r++)
        norm_row((const T*)x + r * x_stride, residual ? (T*)residual + r * d : nullptr,
                 (const W*)weight, (T*)out + r * d, d, eps);
}

// The weight is float32 if `wide`, else of the dtype of x.
EXPORT void rms_norm(int dtype, int wide, const void* x, void* residual, const void* weight,
                     void* out, int64_t rows, int64_t d, int64_t x_stride, float eps, int threads) {
    auto run = dtype == F32    ? norm<float, float>
               : dtype == BF16 ? (wide ? norm<bf16, float> : norm<bf16, bf16>)
                               : (wide ? norm<f16, float> : norm<f16, f16>);
    run(x, residual, weight, out, rows, d, x_stride, eps, threads);
}
REPLAYABLE(rms_norm)

template <class T, class W>
static void norm_heads(void* x, const void* weight, int64_t tokens, int64_t heads, int64_t dh,
                       int64_t stride, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * dh > PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            T* at = (T*)x + t * stride + h * dh;
            norm_row(at, (T*)nullptr, (const W*)weight, at, dh, eps);
        }
}

EXPORT void head_rms_norm(int dtype, int wide, void* x, const void* weight, int64_t tokens,
                          int64_t heads, int64_t dh, int64_t stride, float eps, int threads) {
    auto run = dtype == F32    ? norm_heads<float, float>
               : dtype == BF16 ? (wide ? norm_heads<bf16, float> : norm_heads<bf16, bf16>)
                               : (wide ? norm_heads<f16, float> : norm_heads<f16, f16>);
    run(x, weight, tokens, heads, dh, stride, eps, threads);
}
REPLAYABLE(head_rms_norm)

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
                   int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t dh, int64_t turning,
                   int64_t q_stride, int64_t k_stride, int threads) {
#pragma omp parallel for num_threads(threads) \
    if (tokens * (q_heads + kv_heads) * dh > PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++) {
        const float* angles = cos_sin + positions[t] * turning;
        for (int64_t h = 0; h < q_heads; h++)
            rotate_head((T*)q + t * q_stride + h * dh, angles, turning / 2);
        for (int64_t h = 0; h < kv_heads; h++)
            rotate_head((T*)k + t * k_stride + h * dh, angles, turning / 2);
    }
}

// The first `turning` dimensions of each head turn; that is the table's width.
EXPORT void rotary_embedding(int dtype, void* q, void* k, const int64_t* positions,
                             const float* cos_sin, int64_t tokens, int64_t q_heads,
                             int64_t kv_heads, int64_t dh, int64_t turning, int64_t q_stride,
                             int64_t k_stride, int threads) {
    auto run = dtype == F32 ? rotate<float> : dtype == BF16 ? rotate<bf16> : rotate<f16>;
    run(q, k, positions, cos_sin, tokens, q_heads, kv_heads, dh, turning, q_stride, k_stride,
        threads);
}
REPLAYABLE(rotary_embedding)

struct Silu {
    static vf of(vf v) { return v / (1.0f + vexp(-v)); }
};
// sqrt(2 / pi) (v + 0.044715 v^3) = u, and (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)).
struct GeluTanh {
    static vf of(vf v) {
        vf u = 0.7978845608028654f * (v + 0.044715f * v * v * v);
        return v / (1.0f + vexp(-2.0f * u));
    }
};
// v (1 + erf(v / sqrt(2))) / 2; erf to 1.5e-7 by Abramowitz and Stegun 7.1.26.
struct GeluErf {
    static vf of(vf v) {
        vf z = vmax(v, -v) * 0.7071067811865476f, t = 1.0f / (1.0f + 0.3275911f * z);
        vf p = 1.061405429f * t - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = (p * t + 0.254829592f) * t * vexp(-z * z);  // 1 - erf(z)
        return v * 0.5f * select(v < splat(0.0f), p, 2.0f - p);
    }
};

// The activation is rounded to T before it multiplies, as Hugging Face's modules do.
template <class T, class F>
static void gate(const void* x, void* out, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * n > PARALLEL_ELEMENTS)
    for (int64_t r = 0; r < rows; r++) {
        const T* g = (const T*)x + r * 2 * n;
        const T* u = g + n;
        T* o = (T*)out + r * n;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) {
            store(o + i, F::of(load(g + i)));
            store(o + i, load(o + i) * load(u + i));
        }
        if (i == n) continue;
        T rest[LANES] = {};
        memcpy(rest, g + i, (n - i) * sizeof(T));
        store(rest, F::of(load(rest)));
        for (int64_t j = 0; i + j < n; j++)
            from_float(o + i + j, to_float(rest[j]) * to_float(u[i + j]));
    }
}

template <class F>
static void gate_from(int dtype, const void* x, void* out, int64_t rows, int64_t n, int threads) {
    auto run = dtype == F32 ? gate<float, F> : dtype == BF16 ? gate<bf16, F> : gate<f16, F>;
    run(x, out, rows, n, threads);
}

EXPORT void silu_and_mul(int dtype, const void* x, void* out, int64_t rows, int64_t n,
                         int threads) {
    gate_from<Silu>(dtype, x, out, rows, n, threads);
}
REPLAYABLE(silu_and_mul)

EXPORT void gelu_and_mul(int dtype, int by_tanh, const void* x, void* out, int64_t rows, int64_t n,
                         int threads) {
    auto run = by_tanh ? gate_from<GeluTanh> : gate_from<GeluErf>;
    run(dtype, x, out, rows, n, threads);
}
REPLAYABLE(gelu_and_mul)

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
REPLAYABLE(write_kv)

template <class T, class C>
static void quantize(const void* x, void* cache, float* scales, const int64_t* slots,
                     int64_t tokens, int64_t heads, int64_t block_size, int64_t dh, int64_t stride,
                     int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * heads * dh > PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++) {
        int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
        for (int64_t h = 0; h < heads; h++) {
            int64_t row = (block * heads + h) * block_size + offset;
            scales[row] =
                quantize_head((const T*)x + t * stride + h * dh, (C*)cache + row * dh, dh);
        }
    }
}

// Keys or values to an I8 or E4M3 cache; dh a multiple of LANES, the stride in elements.
EXPORT void write_quantized(int dtype, int cache_type, const void* x, void* cache, float* scales,
                            const int64_t* slots, int64_t tokens, int64_t heads,
                            int64_t block_size, int64_t dh, int64_t stride, int threads) {
    bool whole = cache_type == I8;
    auto run = dtype == F32    ? (whole ? quantize<float, i8> : quantize<float, e4m3>)
               : dtype == BF16 ? (whole ? quantize<bf16, i8> : quantize<bf16, e4m3>)
                               : (whole ? quantize<f16, i8> : quantize<f16, e4m3>);
    run(x, cache, scales, slots, tokens, heads, block_size, dh, stride, threads);
}
REPLAYABLE(write_quantized)
