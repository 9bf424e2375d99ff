// What attention is asked for in one step; kernels/cpu/attention.py fills the same struct.
#pragma once
#include <cstdint>

struct AttentionStep {
    const void *q, *keys, *values;
    const float *key_scales, *value_scales;  // null for a cache that is not quantized
    const int32_t *tables, *context_lens, *query_start;
    const int64_t* trees;  // [tokens] which new tokens of its sequence each may see, or null: all
    void* out;
    int64_t table_stride, sequences, q_heads, kv_heads, block_size, dh, q_stride;
    int64_t window;    // positions that a token sees, itself included; 0: all before it
    float scale, soft_cap;

    int64_t group() const { return q_heads / kv_heads; }
    int64_t new_tokens(int64_t sequence) const {
        return query_start[sequence + 1] - query_start[sequence];
    }
    // The first position that the query at `position` sees.
    int64_t first_seen(int64_t position) const {
        return window && position >= window ? position - window + 1 : 0;
    }
};
