// Linear layers on AMX tiles: bf16, int8 (rows quantized on the fly), and formats widened to bf16.
//
// Weights lie in panels of 32 output columns; a panel is a stream of steps along K, a step is two
// tiles of 16 columns by 64 bytes of K per column, in the pair/quad order that the tile products
// want. Every output element is accumulated over K in the same order whatever M, the threads and
// the blocking are, so a row's result is bit-identical alone and in any batch.
#include <type_traits>
#include <vector>
#include "amx_rows.h"
#include "amx_widen.h"
#include "replay.h"

#if AMX_KERNELS

constexpr int PANEL = 32;            // output columns of a panel
constexpr int64_t STEP_BYTES = 2048; // two tiles
constexpr int64_t A_BLOCK_BYTES = 1 << 20;  // packed rows that stay in L2 while panels stream by

// Activations [m, k] as the caller holds them.
struct Rows {
    const void* data;
    int64_t stride, m;
    int32_t dtype, kind;
    int64_t block;    // ROW_FP8: columns that share a scale, 0 for the whole row
    float parameter;  // ROW_INT8: outlier threshold; ROW_FP8_STATIC: scale
};

static inline int64_t k_per_step(int kind) { return kind == INT8 ? 64 : 32; }

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
    const float* bias;             // [n] or null
    const float* scales;           // INT8, FP8: [n]
    const float* row_scales;       // [m], or null where rows are not rounded
    const Outlier* outliers;       // INT8: those of all rows, or null
    const int64_t* outlier_begin;  // [m + 1]
};

// Outliers of one row against 32 columns of an int8 panel, in floating point, in the order of K.
static void add_outliers(const Output& out, const char* panel, int64_t row, vf* sums) {
    const Outlier* end = out.outliers + out.outlier_begin[row + 1];
    __m512 first = bit_copy<__m512>(sums[0]), second = bit_copy<__m512>(sums[1]);
    for (const Outlier* o = out.outliers + out.outlier_begin[row]; o < end; o++) {
        const char* at = panel + o->k / 64 * STEP_BYTES + o->k % 64 / 4 * 64;
        __m128i left = _mm_cvtsi32_si128(24 - o->k % 4 * 8);
        __m512 value = _mm512_set1_ps(o->value);
        auto column = [=](const char* quads) {
            __m512i top = _mm512_sll_epi32(_mm512_loadu_si512(quads), left);
            return _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
        };
        first = _mm512_fmadd_ps(value, column(at), first);
        second = _mm512_fmadd_ps(value, column(at + 1024), second);
    }
    sums[0] = bit_copy<vf>(first);
    sums[1] = bit_copy<vf>(second);
}

template <class T, int KIND>
static void write_rows(const Output& out, const char* panel, const char* tiles, int64_t row,
                       int64_t rows, int64_t col) {
    constexpr bool SCALED = KIND == INT8 || KIND == FP8;
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
                if (widens(KIND) && out.row_scales) v[t] *= out.row_scales[row + r];
            }
        }
        if (KIND == INT8 && out.outliers) add_outliers(out, panel, row + r, v);
        T* to = (T*)out.data + (row + r) * out.n + col;
        if (cols == PANEL) {
            for (int t = 0; t < 2; t++) {
                if (SCALED) v[t] *= load(out.scales + col + t * LANES);
                if (out.bias) v[t] += load(out.bias + col + t * LANES);
                store(to + t * LANES, v[t]);
            }
        } else {
            float lanes[PANEL];
            store(lanes, v[0]);
            store(lanes + LANES, v[1]);
            for (int64_t c = 0; c < cols; c++) {
                float x = SCALED ? lanes[c] * out.scales[col + c] : lanes[c];
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
static void write_block(const Output& out, const char* panel, int64_t row, int64_t rows,
                        int64_t col) {
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
    write(out, panel, tiles, row, rows, col);
}

// All rows of one A block against one panel.
template <int KIND>
static void run_panel(const char* a, int64_t a_row_stride, int64_t a_step, int64_t a_block,
                      int64_t row, int64_t rows, const Weight& w, int64_t panel, int64_t steps,
                      char* widened, const Output& out) {
    constexpr int64_t SOURCE_STEP = source_step_bytes(KIND);
    const char* source = w.data + panel * steps * SOURCE_STEP;
    int64_t blocks = (rows + 31) / 32;
    auto zero = [] {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    };
    Widener<KIND> widener(w);
    auto widen = [&](int64_t begin, int64_t end, char* to) {
        int64_t group_steps = in_groups(KIND) ? w.group_size / 32 : 1;
        int64_t groups = (steps + group_steps - 1) / group_steps;
        for (int64_t s = begin; s < end; s++) {
            if (in_groups(KIND) && s % group_steps == 0)
                widener.group(w, panel * groups + s / group_steps);
            const char* from = source + s * SOURCE_STEP;
            char* tiles = to + (s - begin) * STEP_BYTES;
            if (blocks == 1) widener.template step<true>(from, tiles);
            else widener.template step<false>(from, tiles);
        }
    };
    // One block streams through the weights, so what comes next lies ahead in this panel and the
    // following one. More blocks use a panel again and again, and have time to fetch the next.
    if (widens(KIND) && blocks == 1) {
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
        write_block<KIND>(out, source, row, rows, panel * PANEL);
        return;
    }
    if (widens(KIND)) widen(0, steps, widened);
    const char* b = widens(KIND) ? widened : source;
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
        write_block<KIND>(out, source, row + r, count, panel * PANEL);
    }
}

// Which elements of rows are outliers, in order; `begin` [m + 1] holds counts at first. What is
// not finite always is one, so that it shows in the result.
template <class T>
static const Outlier* gather_outliers(const Rows& rows, int64_t k, int64_t* begin) {
    static thread_local std::vector<Outlier> found;
    int64_t total = 0;
    for (int64_t r = 0; r <= rows.m; r++) {
        int64_t count = r < rows.m ? begin[r] : 0;
        begin[r] = total;
        total += count;
    }
    if (!total) return nullptr;
    found.resize(total);
    for (int64_t r = 0; r < rows.m; r++)
        if (begin[r + 1] > begin[r])
            list_outliers((const T*)rows.data + r * rows.stride, k, rows.parameter,
                          found.data() + begin[r]);
    return found.data();
}

template <class T>
static void pack_row(const Rows& rows, int64_t k, int64_t steps, int64_t r, char* to, float* scales,
                     int64_t* outliers) {
    const T* x = (const T*)rows.data + r * rows.stride;
    if (rows.kind == ROW_INT8)
        scales[r] = pack_row_int8(x, k, to, steps, rows.parameter, outliers + r);
    else if (rows.kind == ROW_FP8) scales[r] = pack_row_fp8(x, k, to, rows.block);
    else if (rows.kind == ROW_FP8_STATIC) scales[r] = pack_row_fp8_static(x, k, to, rows.parameter);
    else pack_row_bf16(x, k, to, steps);
}

template <int KIND, class T>
static void run(const Rows& x, const Weight& w, Output out, int threads) {
    int64_t m = x.m, step_k = k_per_step(KIND), steps = (w.k + step_k - 1) / step_k;
    int64_t panels = (w.n + PANEL - 1) / PANEL;
    int64_t row_blocks = (m + 15) / 16;
    bool direct = x.kind == ROW_BF16 && std::is_same<T, bf16>::value && m <= 32 && w.k % 32 == 0;
    int64_t packed_bytes = row_blocks * steps * 1024;
    char* packed = direct ? nullptr : scratch<0>(packed_bytes + (m + 1) * 16);
    int64_t* outliers = (int64_t*)(packed + packed_bytes);
    float* row_scales = (float*)(outliers + m + 1);
    if (x.kind != ROW_BF16) out.row_scales = row_scales;
    auto pack = [=](int64_t r) {
        char* to = packed + (r / 16) * steps * 1024 + (r % 16) * 64;
        if (r < m) pack_row<T>(x, w.k, steps, r, to, row_scales, outliers);
        else
            for (int64_t s = 0; s < steps; s++) memset(to + s * 1024, 0, 64);
    };
    bool together = !direct && m > 4;
    int64_t pad_rows = m <= 16 ? m : row_blocks * 16;
    if (!direct && !together) {
        for (int64_t r = 0; r < pad_rows; r++) pack(r);
        if (KIND == INT8) out.outliers = gather_outliers<T>(x, w.k, outliers);
    }
    out.outlier_begin = outliers;
    int64_t block_rows = A_BLOCK_BYTES / (steps * 64) / 32 * 32;
    if (block_rows < 32) block_rows = 32;
    if (panels * steps * ((m + 31) / 32) < 64) threads = 1;  // less work than waking a thread costs
#pragma omp parallel num_threads(threads)
    {
        if (together) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < pad_rows; r++) pack(r);
            if (KIND == INT8) {
#pragma omp single
                out.outliers = gather_outliers<T>(x, w.k, outliers);
            }
        }
        // Packed rows are padded to whole tiles, those that lie with the caller are not.
        configure_tiles(m < 16 ? (int)m : 16, direct && m > 16 ? (int)m - 16 : 16);
        char* widened = widens(KIND) ? scratch<1>(steps * STEP_BYTES) : nullptr;
        for (int64_t row = 0; row < m; row += block_rows) {
            int64_t rows = m - row < block_rows ? m - row : block_rows;
#pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < panels; p++) {
                if (direct)
                    run_panel<KIND>((const char*)x.data, x.stride * 2, 64, x.stride * 32, 0, m, w,
                                    p, steps, widened, out);
                else
                    run_panel<KIND>(packed + row / 16 * steps * 1024, 64, 1024, steps * 1024, row,
                                    rows, w, p, steps, widened, out);
            }
        }
        _tile_release();
    }
}

template <class T>
static void dispatch(const Rows& x, const Weight& w, const Output& out, int threads) {
    switch (w.kind) {
        case DENSE: return run<DENSE, T>(x, w, out, threads);
        case INT8: return run<INT8, T>(x, w, out, threads);
        case INT4: return run<INT4, T>(x, w, out, threads);
        case TABLE4: return run<TABLE4, T>(x, w, out, threads);
        case INT8_GROUPS: return run<INT8_GROUPS, T>(x, w, out, threads);
        case FP8: return run<FP8, T>(x, w, out, threads);
        case FP8_BLOCKS: return run<FP8_BLOCKS, T>(x, w, out, threads);
    }
}
#endif

// x [m, k] of x_dtype with x_stride elements between rows -> out [m, n] of out_dtype, contiguous.
// Rows that are not rounded to int8 or FP8 are seen in bf16; the caller splits wider types.
EXPORT void amx_linear(const void* weight, int x_dtype, const void* x, int64_t x_stride, int64_t m,
                       int row_kind, int64_t row_block, float row_parameter, void* out,
                       int out_dtype, int threads) {
#if AMX_KERNELS
    const Weight& w = *(const Weight*)weight;
    Rows rows{x, x_stride, m, x_dtype, row_kind, row_block, row_parameter};
    Output to{out, out_dtype, w.n, w.bias, (const float*)w.scales, nullptr, nullptr, nullptr};
    auto go = x_dtype == F32 ? dispatch<float> : x_dtype == BF16 ? dispatch<bf16> : dispatch<f16>;
    go(rows, w, to, threads);
#else
    (void)weight, (void)x_dtype, (void)x, (void)x_stride, (void)m, (void)row_kind, (void)row_block;
    (void)row_parameter, (void)out, (void)out_dtype, (void)threads;
#endif
}
REPLAYABLE(amx_linear)

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
REPLAYABLE(panel_embedding)
