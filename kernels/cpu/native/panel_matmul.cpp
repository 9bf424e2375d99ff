// Linear layers of bf16 weights on CPUs without tiles or products of bf16: widened in registers.
//
// Panels are those of amx_matmul.cpp. In a line of 64 bytes lie 16 columns, of each two elements
// that follow each other along K: a shift and a mask make floats of them, and the multipliers are
// busy meanwhile. Every output element is summed over K in the same order whatever M, the threads
// and the blocking are, so a row's result is bit-identical alone and in any batch.
#include "common.h"
#include "replay.h"
#include "thread_scratch.h"

// Rows that are multiplied at once: by both tiles of a panel, or by one after the other. Sums fill
// most registers.
constexpr int FEW = LANES == 16 ? 12 : 3, MANY = LANES == 16 ? 12 : 6;
constexpr int PER_TILE = 16 / LANES;       // registers for a line
constexpr int64_t PANEL = 32;              // output columns
constexpr int64_t STEP = 32;               // positions of K
constexpr int64_t STEP_BYTES = 2048;       // two tiles of 16 columns
constexpr int64_t AHEAD = 4 * STEP_BYTES;  // fetched by the first rows, which wait for memory
constexpr int64_t MOST_STEPS = 16;         // of a panel, that stay in L1 while rows go by
constexpr int64_t CHUNK = 96;              // rows that go by, at most
constexpr int64_t MOST_ROWS = 16 * CHUNK;  // that are widened at once

// sums += ROWS rows of x by TILES tiles of a panel, over `steps` steps; FIRST: that meet it first.
template <int ROWS, int TILES, bool FIRST>
static inline __attribute__((always_inline)) void products(const float* x, int64_t x_stride,
                                                           const char* panel, int64_t steps,
                                                           vf (&sums)[ROWS][TILES * PER_TILE]) {
    constexpr int VECTORS = TILES * PER_TILE;
    for (int64_t s = 0; s < steps; s++, panel += STEP_BYTES, x += STEP)
        for (int64_t pair = 0; pair < 16; pair++) {
            for (int t = 0; t < TILES && FIRST; t++)
                __builtin_prefetch(panel + AHEAD + t * 1024 + pair * 64);
            vf even[VECTORS], odd[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                vu both;
                memcpy(&both, panel + v / PER_TILE * 1024 + pair * 64 + v % PER_TILE * LANES * 4,
                       sizeof both);
                even[v] = bit_copy<vf>(both << 16);
                odd[v] = bit_copy<vf>(both & 0xffff0000u);
            }
            for (int r = 0; r < ROWS; r++) {
                const float* at = x + r * x_stride + pair * 2;
                for (int v = 0; v < VECTORS; v++) sums[r][v] += at[0] * even[v];
                for (int v = 0; v < VECTORS; v++) sums[r][v] += at[1] * odd[v];
            }
        }
}

struct Target {
    void* data;
    const float* bias;
    int64_t n;
};

// Rows of a chunk by a stretch of a panel; between stretches the sums lie in `kept` [CHUNK, PANEL].
struct Stretch {
    const float* x;
    int64_t x_stride;
    const char* panel;
    int64_t steps;
    float* kept;
    int64_t row, column;  // where the first of the rows, and the panel, come in the output
    bool first, last;
};

// A row's sums of `columns` columns from `column` on.
template <class T>
static inline void write(const Target& to, int64_t row, int64_t column, int64_t columns,
                         const vf* sums) {
    T* at = (T*)to.data + row * to.n + column;
    alignas(64) float lanes[PANEL];
    memcpy(lanes, sums, columns > 16 ? PANEL * 4 : 64);
    for (int64_t c = 0; c < columns; c += LANES) {
        int64_t left = columns - c;
        if (left >= LANES) {
            vf v = load(lanes + c);
            if (to.bias) v += load(to.bias + column + c);
            store(at + c, v);
            continue;
        }
        for (int64_t i = c; i < columns; i++)
            from_float(at + i, to.bias ? lanes[i] + to.bias[column + i] : lanes[i]);
    }
}

template <class T, int ROWS, int TILES, bool FIRST>
static void block(const Stretch& s, const Target& to) {
    for (int tile = 0; tile < 2; tile += TILES) {
        int64_t begin = s.column + tile * 16, left = to.n - begin;
        if (left <= 0) return;
        vf sums[ROWS][TILES * PER_TILE] = {};
        float* kept = s.kept + tile * 16;
        for (int r = 0; r < ROWS && !s.first; r++) memcpy(sums[r], kept + r * PANEL, sizeof sums[r]);
        products<ROWS, TILES, FIRST>(s.x, s.x_stride, s.panel + tile * 1024, s.steps, sums);
        int64_t columns = left < TILES * 16 ? left : TILES * 16;
        for (int r = 0; r < ROWS; r++) {
            if (s.last) write<T>(to, s.row + r, begin, columns, sums[r]);
            else memcpy(kept + r * PANEL, sums[r], sizeof sums[r]);
        }
    }
}

template <class T, int ROWS, bool FIRST>
static void of_rows(int64_t rows, const Stretch& s, const Target& to) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return of_rows<T, ROWS - 1, FIRST>(rows, s, to);
    block<T, ROWS, ROWS <= FEW ? 2 : 1, FIRST>(s, to);
}

// Rows of a chunk, float32 with `stride` elements between them, by a panel.
template <class T>
static void multiply(const float* x, int64_t stride, int64_t rows, const char* panel, int64_t steps,
                     int64_t row, int64_t column, const Target& to) {
    alignas(64) float kept[CHUNK * PANEL];
    for (int64_t s = 0; s < steps; s += MOST_STEPS) {
        int64_t count = steps - s < MOST_STEPS ? steps - s : MOST_STEPS;
        for (int64_t r = 0; r < rows; r += MANY) {
            auto go = r == 0 ? of_rows<T, MANY, true> : of_rows<T, MANY, false>;
            go(rows - r < MANY ? rows - r : MANY,
               {x + r * stride + s * STEP, stride, panel + s * STEP_BYTES, count, kept + r * PANEL,
                row + r, column, s == 0, s + count == steps},
               to);
        }
    }
}

// A row in float32, zero beyond K.
template <class X>
static void widen_row(const X* x, int64_t k, int64_t padded, float* to) {
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) store(to + i, load(x + i));
    for (; i < padded; i++) to[i] = i < k ? to_float(x[i]) : 0.0f;
}

template <class X, class T>
static void run(const char* data, int64_t k, const X* x, int64_t x_stride, int64_t m,
                const Target& to, int threads) {
    int64_t steps = (k + STEP - 1) / STEP, padded = steps * STEP;
    int64_t panels = (to.n + PANEL - 1) / PANEL;
    // Rows a multiple of a page apart would all lie in the same few lines of the cache.
    int64_t stride = padded + LANES;
    float* wide = (float*)scratch<0>(m * stride * 4);
    int64_t chunks = (m + CHUNK - 1) / CHUNK;
    int64_t chunk = ((m + chunks - 1) / chunks + MANY - 1) / MANY * MANY;  // alike
    if (panels * steps * m < 1024) threads = 1;  // less work than waking a thread costs
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < m; r++) widen_row(x + r * x_stride, k, padded, wide + r * stride);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < chunks * panels; item++) {
            int64_t panel = item % panels, row = item / panels * chunk;
            if (row >= m) continue;
            multiply<T>(wide + row * stride, stride, m - row < chunk ? m - row : chunk,
                        data + panel * steps * STEP_BYTES, steps, row, panel * PANEL, to);
        }
    }
}

template <class X>
static void into(int out_dtype, const char* data, int64_t k, const void* x, int64_t x_stride,
                 int64_t m, const Target& to, int threads) {
    auto go = out_dtype == F32 ? run<X, float> : out_dtype == BF16 ? run<X, bf16> : run<X, f16>;
    go(data, k, (const X*)x, x_stride, m, to, threads);
}

// data: panels of bf16 [n, k]; bias float32 [n] or null; x [m, k] of x_dtype with x_stride elements
// between rows -> out [m, n] of out_dtype, contiguous; m is not 0.
EXPORT void panel_linear(const char* data, const float* bias, int64_t n, int64_t k, int x_dtype,
                         const void* x, int64_t x_stride, int64_t m, void* out, int out_dtype,
                         int threads) {
    const int64_t x_size = x_dtype == F32 ? 4 : 2, out_size = out_dtype == F32 ? 4 : 2;
    auto go = x_dtype == F32 ? into<float> : x_dtype == BF16 ? into<bf16> : into<f16>;
    for (int64_t row = 0; row < m; row += MOST_ROWS) {
        Target to{(char*)out + row * n * out_size, bias, n};
        go(out_dtype, data, k, (const char*)x + row * x_stride * x_size, x_stride,
           m - row < MOST_ROWS ? m - row : MOST_ROWS, to, threads);
    }
}
REPLAYABLE(panel_linear)
