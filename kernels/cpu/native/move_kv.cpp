// Keys and values from slots of a cache to other slots, where a tree's accepted tokens close up.
#include <vector>
#include "common.h"

// All rows of one tensor [blocks, heads, block_size, row_bytes]: read first, since a slot may be
// the source of one and the target of another.
static void move_rows(char* data, const int64_t* sources, const int64_t* targets, int64_t count,
                      int64_t heads, int64_t block_size, int64_t row_bytes) {
    static thread_local std::vector<char> kept;
    kept.resize(count * heads * row_bytes);
    auto row = [=](int64_t slot, int64_t head) {
        return data + ((slot / block_size * heads + head) * block_size + slot % block_size) * row_bytes;
    };
    for (int reading = 1; reading >= 0; reading--)
        for (int64_t i = 0; i < count; i++) {
            if (sources[i] < 0 || targets[i] < 0) continue;
            for (int64_t h = 0; h < heads; h++) {
                char* at = kept.data() + (i * heads + h) * row_bytes;
                if (reading) memcpy(at, row(sources[i], h), row_bytes);
                else memcpy(row(targets[i], h), at, row_bytes);
            }
        }
}

// The scales are null for a cache that is not quantized. Nothing is moved from or to a slot below 0.
EXPORT void move_kv(char* keys, char* values, char* key_scales, char* value_scales,
                    const int64_t* sources, const int64_t* targets, int64_t count, int64_t heads,
                    int64_t block_size, int64_t row_bytes) {
    for (char* data : {keys, values})
        move_rows(data, sources, targets, count, heads, block_size, row_bytes);
    for (char* scales : {key_scales, value_scales})
        if (scales) move_rows(scales, sources, targets, count, heads, block_size, sizeof(float));
}
