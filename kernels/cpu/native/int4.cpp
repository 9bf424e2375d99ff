// int4 weights on CPUs without AMX: few rows are multiplied while the weight is read, many rows
// multiply a widened copy by PyTorch. data [n, k / 2], even k in the low nibble; scales, zeros
// float32 [n, k / group]; group a multiple of 16.
#include "common.h"
#include "replay.h"
#include <vector>

typedef uint8_t vb __attribute__((vector_size(16)));
typedef uint8_t vn __attribute__((vector_size(LANES)));
constexpr int PARTS = 32 / LANES;

// 32 weights starting at an even position, as vectors of (q - zero) * scale.
static inline void widen(const uint8_t* packed, float zero, float scale, vf (&to)[PARTS]) {
    vb bytes;
    memcpy(&bytes, packed, sizeof bytes);
    vb low = bytes & 15, high = bytes >> 4;
    const vb front = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const vb back = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    vb ordered[2] = {__builtin_shuffle(low, high, front), __builtin_shuffle(low, high, back)};
    for (int part = 0; part < PARTS; part++) {
        vn q;
        memcpy(&q, (const uint8_t*)ordered + part * LANES, sizeof q);
        vf wide = __builtin_convertvector(__builtin_convertvector(q, vi), vf);
        to[part] = (wide - zero) * scale;
    }
}

template <class T>
static void widen_all(const uint8_t* data, const float* scales, const float* zeros, int64_t n,
                      int64_t k, int64_t group, void* out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < n; r++)
        for (int64_t at = 0; at < k; at += 32) {
            vf parts[PARTS];
            int64_t g = r * (k / group) + at / group;
            widen(data + (r * k + at) / 2, zeros[g], scales[g], parts);
            for (int p = 0; p < PARTS; p++) store((T*)out + r * k + at + p * LANES, parts[p]);
        }
}

EXPORT void int4_widen(int dtype, const uint8_t* data, const float* scales, const float* zeros,
                       int64_t n, int64_t k, int64_t group, void* out, int threads) {
    auto run = dtype == F32 ? widen_all<float> : dtype == BF16 ? widen_all<bf16> : widen_all<f16>;
    run(data, scales, zeros, n, k, group, out, threads);
}
REPLAYABLE(int4_widen)

// M rows of float32 x against one row of the weight.
template <int M>
static void row_products(const float* x, const uint8_t* data, const float* scales,
                         const float* zeros, int64_t k, int64_t group, float* to) {
    vf sums[M] = {};
    for (int64_t at = 0; at < k; at += 32) {
        vf parts[PARTS];
        widen(data + at / 2, zeros[at / group], scales[at / group], parts);
        for (int m = 0; m < M; m++)
            for (int p = 0; p < PARTS; p++) sums[m] += parts[p] * load(x + m * k + at + p * LANES);
    }
    for (int m = 0; m < M; m++) to[m] = reduce_add(sums[m]);
}

// x float32 [m, k] contiguous -> out float32 [m, n]; bias float32 [n] or null.
EXPORT void int4_linear(const float* x, int64_t m, const uint8_t* data, const float* scales,
                        const float* zeros, int64_t n, int64_t k, int64_t group, const float* bias,
                        float* out, int threads) {
    constexpr decltype(&row_products<1>) of_rows[] = {
        row_products<1>, row_products<2>, row_products<3>, row_products<4>,
        row_products<5>, row_products<6>, row_products<7>, row_products<8>};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < n; r++) {
        const uint8_t* row = data + r * k / 2;
        const float *s = scales + r * (k / group), *z = zeros + r * (k / group);
        for (int64_t i = 0; i < m; i += 8) {
            float products[8];
            int64_t rows = m - i < 8 ? m - i : 8;
            of_rows[rows - 1](x + i * k, row, s, z, k, group, products);
            for (int64_t j = 0; j < rows; j++)
                out[(i + j) * n + r] = products[j] + (bias ? bias[r] : 0.0f);
        }
    }
}
REPLAYABLE(int4_linear)
