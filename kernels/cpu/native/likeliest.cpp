// The likeliest token of each row of logits, and what it has of the softmax.
#include <cmath>
#include "common.h"
#include "replay.h"

constexpr int64_t PARALLEL_LOGITS = 1 << 16;

template <class T>
static vf load_some(const T* x, int64_t count) {
    T rest[LANES] = {};
    memcpy(rest, x, count * sizeof(T));
    vf v = load(rest);
    for (int64_t i = count; i < LANES; i++) v[i] = -INFINITY;
    return v;
}

// The first of the highest: as PyTorch's argmax on a CPU, but for rows with a NaN, which give 0.
template <class T>
static void of_row(const T* x, int64_t n, int64_t* token, float* share) {
    vf best = splat(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) best = vmax(load(x + i), best);
    if (i < n) best = vmax(load_some(x + i, n - i), best);
    float highest = reduce_max(best);
    vf sum = splat(0.0f);
    int64_t first = n;
    for (i = 0; i < n; i += LANES) {
        vf v = i + LANES <= n ? load(x + i) : load_some(x + i, n - i);
        if (first == n) {
            vi equal = v == highest;
            for (int lane = 0; lane < LANES && first == n; lane++)
                if (equal[lane]) first = i + lane;
        }
        sum += vexp(v - highest);
    }
    *token = first < n ? first : 0;
    *share = 1.0f / reduce_add(sum);
}

template <class T>
static void of_rows(const void* logits, int64_t rows, int64_t n, int64_t* tokens, float* shares,
                    int threads) {
#pragma omp parallel for num_threads(threads) if (rows * n > PARALLEL_LOGITS)
    for (int64_t r = 0; r < rows; r++)
        of_row((const T*)logits + r * n, n, tokens + r, shares + r);
}

// logits [rows, n], contiguous -> tokens and shares [rows].
EXPORT void likeliest_shares(int dtype, const void* logits, int64_t rows, int64_t n,
                             int64_t* tokens, float* shares, int threads) {
    auto run = dtype == F32 ? of_rows<float> : dtype == BF16 ? of_rows<bf16> : of_rows<f16>;
    run(logits, rows, n, tokens, shares, threads);
}
REPLAYABLE(likeliest_shares)
