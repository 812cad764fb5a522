// What attention is asked for, and the pieces that it is cut into: plain structs, no torch.
#pragma once

#include <cstdint>

#include "operators.h"

namespace sluice {

constexpr int attention_chunk = 256;  // positions whose results are summed before they are combined with others
constexpr int max_item_rows = 64;     // rows of an item, over its heads
constexpr int max_head_dim = 256;

// A row is one query head of one token; the rows of a key head are counted token by token. An item takes rows
// [row_first, row_first + row_count) of each key head [head_first, head_last) through chunks [chunk_first, chunk_last).
// Items that share rows and heads form a unit, whose last to finish combines its chunks.
struct AttentionItem {
    int32_t seq;
    int32_t row_first;
    int32_t row_count;
    int32_t head_first;
    int32_t head_last;
    int32_t chunk_first;
    int32_t chunk_last;
    int32_t unit;  // -1: the item is whole
    int32_t unit_parts;
    int32_t unit_chunk_first;
    int32_t unit_chunk_last;
    int32_t partial;  // the unit's first row of partial results
};
static_assert(sizeof(AttentionItem) == 12 * sizeof(int32_t));

struct Attention {
    Type type;             // of the caches
    Type rows;             // of q, k, v: the caches', or f32; bf16 or f32 where those are bytes
    const void* q;         // [tokens, q_heads, dim], q_stride numbers from token to token; not rotated
    const void* k;         // [tokens, kv_heads, dim]
    const void* v;
    int64_t q_stride;
    int64_t k_stride;
    int64_t v_stride;
    int64_t tokens;
    bool single_tokens;    // as attention_plan.h says: whoever attends one writes it
    int64_t q_heads;
    int64_t kv_heads;
    int64_t dim;               // a multiple of 16, at most max_head_dim
    const float* cos_sin;      // [max_positions, dim]
    const int64_t* positions;  // [tokens]
    const int64_t* slots;      // [tokens], -1 = do not write
    void* k_cache;             // attention_heads.h has the layout
    void* v_cache;
    int64_t block_stride;  // numbers from block to block
    int64_t block_size;    // a multiple of 16
    const int32_t* tables;  // [seqs, table_stride]
    int64_t table_stride;
    const int32_t* seq_lens;  // [seqs]
    const int32_t* starts;    // [seqs + 1]
    const AttentionItem* items;
    int64_t num_items;
    int64_t units;
    int64_t partial_rows;
    float scale;
    int64_t window;  // 0 = none
    void* out;       // [tokens, q_heads, dim] of out_type
    Type out_type;
};

}  // namespace sluice
