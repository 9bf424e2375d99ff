// What the AMX files share: whether they are compiled in, and the tile shapes.
#pragma once
#include "common.h"
#include "thread_scratch.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && \
    defined(__AVX512VBMI__) && defined(__linux__)
#define AMX_KERNELS 1
#else
#define AMX_KERNELS 0
#endif

#if AMX_KERNELS
// Tiles 0..3 accumulate, 4 and 5 hold left operands, 6 and 7 right operands. Left operands have
// `rows` rows, that of tile 5, for which 2 and 3 accumulate, `second_rows`.
static inline void configure_tiles(int rows, int second_rows) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int t = 0; t < 8; t++) {
        config.bytes[t] = 64;
        config.rows[t] = t > 5 ? 16 : t == 2 || t == 3 || t == 5 ? second_rows : rows;
    }
    _tile_loadconfig(&config);
}
#endif
