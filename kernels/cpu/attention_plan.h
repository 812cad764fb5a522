// Cuts a step's attention into items of similar cost for a number of threads: the largest first, as threads take them in turn.
//
// A sequence with few rows keeps its key heads together, so that a block of the cache is read as one stretch; where there are
// fewer sequences than threads want, contexts are split at chunks, then heads. How it is cut changes no result.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_call.h"

namespace sluice {

struct AttentionPlan {
    std::vector<AttentionItem> items;
    int32_t units = 0;
    int32_t partial_rows = 0;
};

constexpr int prompt_rows = 48;      // rows of one key head that share what they read of the context
constexpr int items_a_thread = 4;    // so that the threads end together
constexpr int64_t least_cost = 512;  // rows times positions below which a cut costs more than it gives

constexpr int64_t most_partial_rows = 1 << 16;  // results of chunks that a step keeps: 37 MB of heads of 128 numbers

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether whoever attends a sequence can write its keys and values, too: it has one token, whose slot is its last position's, and one item
// has all rows of a key head there. (A block that is being written is in one sequence's table alone.)
inline bool tokens_are_single(const Attention& call, int64_t num_seqs) {
    if (call.tokens != num_seqs || call.q_heads / call.kv_heads > prompt_rows) return false;
    for (int64_t seq = 0; seq < num_seqs; ++seq) {
        if (call.starts[seq + 1] != seq + 1) return false;
        const int64_t last = call.seq_lens[seq] - 1, block = call.tables[seq * call.table_stride + last / call.block_size];
        if (call.slots[seq] != block * call.block_size + last % call.block_size) return false;
    }
    return true;
}

class AttentionPlanner {
public:
    AttentionPlanner(const int32_t* starts, const int32_t* seq_lens, int64_t num_seqs, int64_t q_heads, int64_t kv_heads, int64_t window)
        : starts_(starts), seq_lens_(seq_lens), num_seqs_(num_seqs), group_(q_heads / kv_heads), kv_heads_(kv_heads), window_(window) {}

    AttentionPlan plan(int64_t threads) {
        for (int64_t seq = 0; seq < num_seqs_; ++seq) cut_rows((int32_t)seq);
        int64_t total = 0;
        for (const AttentionItem& item : whole_) total += cost(item);
        const int64_t share = std::max(total / (threads * items_a_thread), least_cost);
        for (const AttentionItem& item : whole_) split(item, threads > 1 ? divide_up(cost(item), share) : 1);
        std::stable_sort(plan_.items.begin(), plan_.items.end(),
                         [&](const AttentionItem& a, const AttentionItem& b) { return cost(a) > cost(b); });
        return std::move(plan_);
    }

private:
    void cut_rows(int32_t seq) {
        const int64_t rows = (starts_[seq + 1] - starts_[seq]) * group_;
        const int64_t most = group_ <= prompt_rows ? prompt_rows / group_ * group_ : prompt_rows;
        const int64_t heads = rows <= most ? std::clamp<int64_t>(max_item_rows / std::max<int64_t>(rows, 1), 1, kv_heads_) : 1;
        const int64_t parts = divide_up(kv_heads_, heads);
        for (int64_t row = 0; row < rows; row += most) {
            const int64_t count = std::min(most, rows - row);
            for (int64_t part = 0; part < parts; ++part) {
                AttentionItem item{};
                item.seq = seq;
                item.row_first = (int32_t)row;
                item.row_count = (int32_t)count;
                item.head_first = (int32_t)(kv_heads_ * part / parts);
                item.head_last = (int32_t)(kv_heads_ * (part + 1) / parts);
                item.chunk_first = (int32_t)(first_seen(seq, row / group_) / attention_chunk);
                item.chunk_last = (int32_t)(position(seq, (row + count - 1) / group_) / attention_chunk + 1);
                item.unit = -1;
                whole_.push_back(item);
            }
        }
    }

    void split(const AttentionItem& whole, int64_t wanted) {
        const int64_t chunks = whole.chunk_last - whole.chunk_first, heads = whole.head_last - whole.head_first;
        const bool room = plan_.partial_rows + chunks * whole.row_count * heads <= most_partial_rows;
        const int64_t chunk_parts = room ? std::clamp<int64_t>(wanted, 1, chunks) : 1;
        const int64_t head_parts = std::clamp<int64_t>(wanted / chunk_parts, 1, heads);
        for (int64_t i = 0; i < head_parts; ++i) {
            AttentionItem item = whole;
            item.head_first = (int32_t)(whole.head_first + heads * i / head_parts);
            item.head_last = (int32_t)(whole.head_first + heads * (i + 1) / head_parts);
            if (chunk_parts == 1) {
                plan_.items.push_back(item);
                continue;
            }
            item.unit = plan_.units++;
            item.unit_parts = (int32_t)chunk_parts;
            item.unit_chunk_first = whole.chunk_first;
            item.unit_chunk_last = whole.chunk_last;
            item.partial = plan_.partial_rows;
            plan_.partial_rows += (int32_t)(chunks * item.row_count * (item.head_last - item.head_first));
            for (int64_t j = 0; j < chunk_parts; ++j) {
                item.chunk_first = (int32_t)(whole.chunk_first + chunks * j / chunk_parts);
                item.chunk_last = (int32_t)(whole.chunk_first + chunks * (j + 1) / chunk_parts);
                plan_.items.push_back(item);
            }
        }
    }

    int64_t position(int64_t seq, int64_t token) const { return seq_lens_[seq] - (starts_[seq + 1] - starts_[seq]) + token; }
    int64_t first_seen(int64_t seq, int64_t token) const {
        return window_ ? std::max<int64_t>(position(seq, token) - window_ + 1, 0) : 0;
    }
    // Rows times positions.
    int64_t cost(const AttentionItem& item) const {
        const int64_t last = position(item.seq, (item.row_first + item.row_count - 1) / group_) + 1;
        const int64_t from = std::max<int64_t>((int64_t)item.chunk_first * attention_chunk, first_seen(item.seq, item.row_first / group_));
        const int64_t to = std::min<int64_t>((int64_t)item.chunk_last * attention_chunk, last);
        return item.row_count * (item.head_last - item.head_first) * (to - from);
    }

    const int32_t* starts_;
    const int32_t* seq_lens_;
    int64_t num_seqs_;
    int64_t group_;
    int64_t kv_heads_;
    int64_t window_;
    std::vector<AttentionItem> whole_;
    AttentionPlan plan_;
};

}  // namespace sluice
