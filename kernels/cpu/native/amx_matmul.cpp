// Linear layers on AMX tiles: bf16, int8 (rows quantized on the fly) and int4 (widened to bf16).
//
// Weights lie in panels of 32 output columns; a panel is a stream of steps along K, a step is two
// tiles of 16 columns by 64 bytes of K per column, in the pair/quad order that the tile products
// want. Every output element is accumulated over K in the same order whatever M, the threads and
// the blocking are, so a row's result is bit-identical alone and in any batch.
#include "common.h"
#include "amx_tiles.h"

#if AMX_KERNELS
#include <cmath>
#include <type_traits>

constexpr int PANEL = 32;            // output columns of a panel
constexpr int64_t STEP_BYTES = 2048; // two tiles
constexpr int64_t A_BLOCK_BYTES = 1 << 20;  // packed rows that stay in L2 while panels stream by
enum Kind { DENSE = 0, INT8 = 1, INT4 = 2 };

struct Weight {
    const char* data;
    const float* scales;  // INT8: [n]; INT4: [panels, groups, 32]
    const f16* zeros;     // INT4: [panels, groups, 32]
    int64_t n, k, group_size;
};

static inline int64_t k_per_step(int kind) { return kind == INT8 ? 64 : 32; }

// Rows of x as tiles: [row block of 16][step][16 rows][64 bytes], zero beyond M and K.
template <class T>
static void pack_row_bf16(const T* x, int64_t k, char* tile_row, int64_t steps) {
    for (int64_t s = 0; s < steps; s++) {
        bf16* to = (bf16*)(tile_row + s * 1024);
        int64_t base = s * 32, left = k - base < 32 ? k - base : 32;
        if (left == 32) {
            store(to, load(x + base));
            store(to + LANES, load(x + base + LANES));
        } else {
            for (int64_t i = 0; i < 32; i++) from_float(to + i, i < left ? to_float(x[base + i]) : 0.0f);
        }
    }
}

// Symmetric int8 by the row's own maximum; returns the row's scale.
template <class T>
static float pack_row_int8(const T* x, int64_t k, char* tile_row, int64_t steps) {
    vf best = splat(0.0f);
    float largest = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        vf v = load(x + i);
        best = vmax(best, vmax(v, -v));
    }
    for (; i < k; i++) largest = fmaxf(largest, fabsf(to_float(x[i])));
    largest = fmaxf(largest, reduce_max(best));
    float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    for (int64_t s = 0; s < steps; s++) {
        char* to = tile_row + s * 1024;
        for (int64_t j = 0; j < 64; j += LANES) {
            int64_t at = s * 64 + j;
            float lanes[LANES];
            vf v;
            if (at + LANES <= k) v = load(x + at);
            else {
                for (int64_t l = 0; l < LANES; l++) lanes[l] = at + l < k ? to_float(x[at + l]) : 0;
                v = load(lanes);
            }
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(bit_copy<__m512>(v), _mm512_set1_ps(inverse)));
            __m128i bytes = _mm512_cvtsepi32_epi8(q);
            memcpy(to + j, &bytes, sizeof bytes);
        }
    }
    return largest / 127.0f;
}

// One step of an int4 panel: 2 x 256 bytes -> two bf16 tiles. A dword holds nibbles of 8 half rows.
struct Dequantizer {
    __m512 scale[4], offset[4];
    __m512 table;
    __m512i spread;

    Dequantizer() {
        table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        spread = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    }
    void group(const float* scales, const f16* zeros) {
        for (int t = 0; t < 2; t++) {
            __m512 s = _mm512_loadu_ps(scales + t * 16);
            __m512 z = bit_copy<__m512>(load(zeros + t * 16));
            __m512 o = _mm512_mul_ps(s, _mm512_sub_ps(_mm512_setzero_ps(), z));
            __m512i high = _mm512_add_epi32(spread, _mm512_set1_epi32(8));
            scale[t * 2] = _mm512_permutexvar_ps(spread, s);
            scale[t * 2 + 1] = _mm512_permutexvar_ps(high, s);
            offset[t * 2] = _mm512_permutexvar_ps(spread, o);
            offset[t * 2 + 1] = _mm512_permutexvar_ps(high, o);
        }
    }
    __attribute__((always_inline)) void step(const char* packed, char* tiles) const {
        for (int t = 0; t < 2; t++)
            for (int v = 0; v < 4; v++) {
                __m512i q = _mm512_loadu_si512(packed + t * 256 + v * 64);
                char* rows = tiles + t * 1024 + v * 256;
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    __m512 lo = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 8 * j), table);
                    __m512 hi = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 8 * j + 4), table);
                    lo = _mm512_fmadd_ps(lo, scale[t * 2], offset[t * 2]);
                    hi = _mm512_fmadd_ps(hi, scale[t * 2 + 1], offset[t * 2 + 1]);
                    _mm512_store_si512(rows + j * 64, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
                }
            }
    }
};

template <int KIND>
static inline __attribute__((always_inline)) void multiply(bool second_row) {
    if (KIND == INT8) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if (second_row) {
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (second_row) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

// Lines of memory to ask for while multiplying, some with every step: what comes next.
struct Ahead {
    const char* next;
    int64_t lines_per_step;

    inline __attribute__((always_inline)) void fetch() {
        for (int64_t i = 0; i < lines_per_step; i++) _mm_prefetch(next + i * 64, _MM_HINT_T1);
        next += lines_per_step * 64;
    }
};

// Tiles 0..3 += rows x panel over `steps` steps.
template <int KIND, bool TWO>
static void accumulate(const char* a0, const char* a1, int64_t a_row_stride, int64_t a_step,
                       const char* b, int64_t steps, Ahead& ahead) {
    for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, a0 + s * a_step, a_row_stride);
        if (TWO) _tile_loadd(5, a1 + s * a_step, a_row_stride);
        _tile_loadd(6, b + s * STEP_BYTES, 64);
        _tile_loadd(7, b + s * STEP_BYTES + 1024, 64);
        ahead.fetch();
        multiply<KIND>(TWO);
    }
}

struct Output {
    void* data;
    int dtype;
    int64_t n;
    const float* bias;        // [n] or null
    const float* row_scales;  // INT8: [m]
    const float* scales;      // INT8: [n]
};

template <class T, int KIND>
static void write_rows(const Output& out, const char* tiles, int64_t row, int64_t rows, int64_t col) {
    int64_t cols = out.n - col < PANEL ? out.n - col : PANEL;
    for (int64_t r = 0; r < rows; r++) {
        const char* at = tiles + r / 16 * 2048 + r % 16 * 64;
        vf v[2];
        for (int t = 0; t < 2; t++) {
            if (KIND == INT8) {
                vi products;
                memcpy(&products, at + t * 1024, sizeof products);
                v[t] = __builtin_convertvector(products, vf) * out.row_scales[row + r];
            } else {
                v[t] = load((const float*)(at + t * 1024));
            }
        }
        T* to = (T*)out.data + (row + r) * out.n + col;
        if (cols == PANEL) {
            for (int t = 0; t < 2; t++) {
                if (KIND == INT8) v[t] *= load(out.scales + col + t * LANES);
                if (out.bias) v[t] += load(out.bias + col + t * LANES);
                store(to + t * LANES, v[t]);
            }
        } else {
            float lanes[PANEL];
            store(lanes, v[0]);
            store(lanes + LANES, v[1]);
            for (int64_t c = 0; c < cols; c++) {
                float x = KIND == INT8 ? lanes[c] * out.scales[col + c] : lanes[c];
                from_float(to + c, out.bias ? x + out.bias[col + c] : x);
            }
        }
    }
}

// The output lines of a block, fetched for writing while its products are computed.
static void fetch_output(const Output& out, int64_t row, int64_t rows, int64_t col) {
    int64_t size = out.dtype == F32 ? 4 : 2;
    for (int64_t r = 0; r < rows; r++) {
        const char* to = (const char*)out.data + ((row + r) * out.n + col) * size;
        __builtin_prefetch(to, 1);
        if (size == 4) __builtin_prefetch(to + 64, 1);
    }
}

template <int KIND>
static void write_block(const Output& out, int64_t row, int64_t rows, int64_t col) {
    alignas(64) char tiles[4096];
    _tile_stored(0, tiles, 64);
    _tile_stored(1, tiles + 1024, 64);
    if (rows > 16) {
        _tile_stored(2, tiles + 2048, 64);
        _tile_stored(3, tiles + 3072, 64);
    }
    auto write = out.dtype == F32    ? write_rows<float, KIND>
                 : out.dtype == BF16 ? write_rows<bf16, KIND>
                                     : write_rows<f16, KIND>;
    write(out, tiles, row, rows, col);
}

// All rows of one A block against one panel.
template <int KIND>
static void run_panel(const char* a, int64_t a_row_stride, int64_t a_step, int64_t a_block,
                      int64_t row, int64_t rows, const Weight& w, int64_t panel, int64_t steps,
                      char* widened, const Output& out) {
    constexpr int64_t SOURCE_STEP = KIND == INT4 ? 512 : STEP_BYTES;
    const char* source = w.data + panel * steps * SOURCE_STEP;
    int64_t blocks = (rows + 31) / 32;
    auto zero = [] {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    };
    Dequantizer dequantizer;
    auto widen = [&](int64_t begin, int64_t end, char* to) {
        int64_t group_steps = w.group_size / 32, groups = w.k / w.group_size;
        for (int64_t s = begin; s < end; s++) {
            if (s % group_steps == 0) {
                int64_t at = (panel * groups + s / group_steps) * PANEL;
                dequantizer.group(w.scales + at, w.zeros + at);
            }
            if (blocks == 1)
                for (int64_t line = 0; line < 512; line += 64)
                    _mm_prefetch(source + s * 512 + 4096 + line, _MM_HINT_T0);
            dequantizer.step(source + s * 512, to + (s - begin) * STEP_BYTES);
        }
    };
    // One block streams through the weights, so what comes next lies ahead in this panel and the
    // following one. More blocks use a panel again and again, and have time to fetch the next.
    if (KIND == INT4 && blocks == 1) {
        constexpr int64_t PIECE = 4;  // steps widened at once: 8 KiB, used while still in L1
        Ahead none{nullptr, 0};
        zero();
        for (int64_t s = 0; s < steps; s += PIECE) {
            int64_t end = s + PIECE < steps ? s + PIECE : steps;
            char* to = widened + (s / PIECE % 2) * PIECE * STEP_BYTES;
            widen(s, end, to);
            if (rows > 16)
                accumulate<KIND, true>(a + s * a_step, a + a_block + s * a_step, a_row_stride,
                                       a_step, to, end - s, none);
            else
                accumulate<KIND, false>(a + s * a_step, a, a_row_stride, a_step, to, end - s, none);
        }
        write_block<KIND>(out, row, rows, panel * PANEL);
        return;
    }
    if (KIND == INT4) widen(0, steps, widened);
    const char* b = KIND == INT4 ? widened : source;
    constexpr int64_t SOURCE_LINES = SOURCE_STEP / 64;
    Ahead ahead{blocks == 1 ? source + 4 * SOURCE_STEP : source + steps * SOURCE_STEP,
                (SOURCE_LINES + blocks - 1) / blocks};
    for (int64_t r = 0; r < rows; r += 32) {
        const char* a0 = a + r / 16 * a_block;
        int64_t count = rows - r < 32 ? rows - r : 32;
        fetch_output(out, row + r, count, panel * PANEL);
        zero();
        if (count > 16)
            accumulate<KIND, true>(a0, a0 + a_block, a_row_stride, a_step, b, steps, ahead);
        else
            accumulate<KIND, false>(a0, a0, a_row_stride, a_step, b, steps, ahead);
        write_block<KIND>(out, row + r, count, panel * PANEL);
    }
}

template <int KIND, class T>
static void run(const T* x, int64_t x_stride, int64_t m, const Weight& w, Output out, int threads) {
    int64_t step_k = k_per_step(KIND), steps = (w.k + step_k - 1) / step_k;
    int64_t panels = (w.n + PANEL - 1) / PANEL;
    int64_t row_blocks = (m + 15) / 16;
    bool direct = KIND != INT8 && std::is_same<T, bf16>::value && m <= 16 && w.k % 32 == 0;
    int64_t packed_bytes = row_blocks * steps * 1024;
    char* packed = direct ? nullptr : scratch<0>(packed_bytes + m * sizeof(float));
    float* row_scales = (float*)(packed + packed_bytes);
    if (KIND == INT8) out.row_scales = row_scales;
    auto pack = [=](int64_t r) {
        char* to = packed + (r / 16) * steps * 1024 + (r % 16) * 64;
        if (r >= m) {
            for (int64_t s = 0; s < steps; s++) memset(to + s * 1024, 0, 64);
        } else if (KIND == INT8) {
            row_scales[r] = pack_row_int8(x + r * x_stride, w.k, to, steps);
        } else {
            pack_row_bf16(x + r * x_stride, w.k, to, steps);
        }
    };
    bool together = !direct && m > 4;
    int64_t pad_rows = m <= 16 ? m : row_blocks * 16;
    if (!direct && !together)
        for (int64_t r = 0; r < pad_rows; r++) pack(r);
    int64_t block_rows = A_BLOCK_BYTES / (steps * 64) / 32 * 32;
    if (block_rows < 32) block_rows = 32;
    if (panels * steps * ((m + 31) / 32) < 64) threads = 1;  // less work than waking a thread costs
#pragma omp parallel num_threads(threads)
    {
        if (together) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < pad_rows; r++) pack(r);
        }
        configure_tiles(m < 16 ? (int)m : 16);
        char* widened = KIND == INT4 ? scratch<1>(steps * STEP_BYTES) : nullptr;
        for (int64_t row = 0; row < m; row += block_rows) {
            int64_t rows = m - row < block_rows ? m - row : block_rows;
#pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < panels; p++) {
                if (direct)
                    run_panel<KIND>((const char*)x, x_stride * 2, 64, 0, 0, m, w, p, steps, widened,
                                    out);
                else
                    run_panel<KIND>(packed + row / 16 * steps * 1024, 64, 1024, steps * 1024, row,
                                    rows, w, p, steps, widened, out);
            }
        }
        _tile_release();
    }
}

template <class T>
static void dispatch(int kind, const void* x, int64_t stride, int64_t m, const Weight& w,
                     const Output& out, int threads) {
    if (kind == DENSE) run<DENSE>((const T*)x, stride, m, w, out, threads);
    else if (kind == INT8) run<INT8>((const T*)x, stride, m, w, out, threads);
    else run<INT4>((const T*)x, stride, m, w, out, threads);
}
#endif

// x [m, k] of x_dtype with x_stride elements between rows -> out [m, n] of out_dtype, contiguous.
// Dense and int4 see x rounded to bf16; the caller splits wider types.
EXPORT void amx_linear(int kind, int x_dtype, const void* x, int64_t x_stride, int64_t m,
                       const void* data, const float* scales, const void* zeros, int64_t n,
                       int64_t k, int64_t group_size, const float* bias, void* out, int out_dtype,
                       int threads) {
#if AMX_KERNELS
    Weight w{(const char*)data, scales, (const f16*)zeros, n, k, group_size};
    Output to{out, out_dtype, n, bias, nullptr, scales};
    auto go = x_dtype == F32 ? dispatch<float> : x_dtype == BF16 ? dispatch<bf16> : dispatch<f16>;
    go(kind, x, x_stride, m, w, to, threads);
#else
    (void)kind, (void)x_dtype, (void)x, (void)x_stride, (void)m, (void)data, (void)scales;
    (void)zeros, (void)n, (void)k, (void)group_size, (void)bias, (void)out, (void)out_dtype;
    (void)threads;
#endif
}

// Rows of a bf16 weight in panels: ids [count] -> out [count, k]. A row lies in pieces of 4 bytes.
EXPORT void panel_embedding(const char* data, const int64_t* ids, int64_t count, int64_t k,
                            uint16_t* out, int threads) {
    int64_t steps = (k + 31) / 32;
#pragma omp parallel for num_threads(threads) if (count > 8)
    for (int64_t i = 0; i < count; i++) {
        int64_t id = ids[i];
        const char* from = data + (id / 32 * steps * 2 + id % 32 / 16) * 1024 + id % 16 * 4;
        for (int64_t pair = 0; pair < (k + 1) / 2; pair++) {
            const char* at = from + pair / 16 * 2048 + pair % 16 * 64;
            memcpy(out + i * k + pair * 2, at, k - pair * 2 >= 2 ? 4 : 2);
        }
    }
}
