// Rotary positions, KV write and paged causal attention of one layer as one call; work from attention_plan.h.
//
// The context is walked in chunks of 256 positions counted from the sequence's start. Each gives its rows a peak, a total and a weighted
// sum of values; those are combined in the order of the chunks. A row's result is therefore the same, bit for bit, in a decode and in a
// prompt of any chunking, beside any other rows, on any number of threads and however the context is split between them.
// Slots that no row of a tile sees are never multiplied. One that others of its tile see has weight 0 for a row: a finite number there
// cannot reach its result, an infinite one can.
#pragma once

namespace SLUICE_ISA {

using sluice::AttentionItem;
using sluice::attention_chunk;
using sluice::max_item_rows;

constexpr int chunk_lines = attention_chunk / line_lanes;
constexpr int64_t tokens_written_at_once = 2;
constexpr int64_t rows_asked_ahead = 8;

// Where the lines [first, last) of one chunk lie: `keys` of the first step, `bytes in order` for asking ahead and for values.
struct Lines {
    int64_t low;  // positions in the chunk that some row of the item sees: [low, high)
    int64_t high;
    int first;
    int last;
    int64_t keys[chunk_lines];
    int64_t values[chunk_lines];
};

template <class Cache>
class Worker {
    using Stored = typename Cache::Stored;
    using Factor = typename Cache::Factor;
    static constexpr int pair = Cache::pair;
    static constexpr bool matrices = Simd::matrices && Cache::type == Type::bf16;
    static constexpr int highest = matrices ? 16 : highest_tile;
    static constexpr int64_t weights_stride = attention_chunk * (int64_t)(sizeof(float) / sizeof(Factor));

public:
    static int64_t scratch_bytes(int64_t dim) {
        return max_item_rows * 4 * (attention_chunk + 2 * result_size(dim) + 2 + dim) + dim * 4 + 2 * part_bytes(dim);
    }
    Worker(const Attention& call, float* partials, int32_t* unfinished, uint8_t* memory)
        : call_(call), dim_(call.dim), group_(call.q_heads / call.kv_heads), partials_(partials), unfinished_(unfinished) {
        scores_ = (float*)memory;
        sums_ = scores_ + max_item_rows * attention_chunk;
        state_ = sums_ + max_item_rows * result_size(dim_);
        query_scales_ = state_ + max_item_rows * result_size(dim_);
        weight_scales_ = query_scales_ + max_item_rows;
        queries_ = (Factor*)(weight_scales_ + max_item_rows);
        part_lines_ = (Stored*)(queries_ + max_item_rows * dim_);
        half_pair_ = part_lines_ + 2 * part_bytes(dim_) / (int64_t)sizeof(Stored);
    }

    // `next`: what this thread will be given after `item`, or null.
    void run(const AttentionItem& item, const AttentionItem* next) {
        item_ = &item;
        heads_ = item.head_last - item.head_first;
        rows_ = heads_ * item.row_count;
        if (writes(item)) write_token<Cache>(call_, call_.starts[item.seq], item.head_first, item.head_last);
        if (next && writes(*next)) expect_token<Cache>(call_, call_.starts[next->seq], next->head_first, next->head_last);
        load_queries();
        Lines here = lines_of(item, item.chunk_first), after;
        for (int chunk = item.chunk_first; chunk < item.chunk_last; ++chunk) {
            const bool ends = chunk + 1 == item.chunk_last;
            const Stored* after_keys = nullptr;
            if (!ends) {
                after = lines_of(item, chunk + 1);
                after_keys = keys(item.head_first);
            } else if (next) {
                after = lines_of(*next, next->chunk_first);
                after_keys = keys(next->head_first);
            }
            const bool starts = chunk == item.chunk_first;
            float* sums = item.unit >= 0 ? partial(chunk, 0) : starts ? state_ : sums_;
            // So many at once that their scores stay in the nearest cache.
            const int64_t at_once = matrices ? 1 : tiles();
            for (int64_t tile = 0; tile < tiles(); tile += at_once) {
                score(here, tile, tile + at_once);
                weigh(here, chunk, sums, tile, tile + at_once);
                add_values(here, chunk, sums, after_keys ? &after : nullptr, after_keys, tile, tile + at_once);
            }
            if (sums == sums_) {
                for (int64_t row = 0; row < rows_; ++row) combine(sums + row * result_size(dim_), dim_, call_.scale, state(row));
            }
            here = after;
        }
        if (item.unit < 0) write();
        else if (__atomic_sub_fetch(unfinished_ + item.unit, 1, __ATOMIC_ACQ_REL) == 0) finish_unit();
    }

private:
    // Whether the item's token is its own to write: of single tokens it is with whoever sees the last position.
    bool writes(const AttentionItem& item) const {
        return call_.single_tokens && (item.unit < 0 || item.chunk_last == item.unit_chunk_last);
    }

    static int64_t part_bytes(int64_t dim) { return matrices ? line_lanes * dim * (int64_t)sizeof(Stored) : 0; }
    float* state(int64_t row) { return state_ + row * result_size(dim_); }
    float* partial(int chunk, int64_t row) {
        const int64_t place = item_->partial + (chunk - item_->unit_chunk_first) * rows_ + row;
        return partials_ + place * result_size(dim_);
    }
    const Stored* keys(int64_t head) const { return (const Stored*)call_.k_cache + head * key_stride<Cache>(dim_, call_.block_size); }
    const Stored* values(int64_t head) const { return (const Stored*)call_.v_cache + head * dim_ * call_.block_size; }

    int64_t position(const AttentionItem& item, int64_t row) const {
        const int64_t tokens = call_.starts[item.seq + 1] - call_.starts[item.seq];
        return call_.seq_lens[item.seq] - tokens + (item.row_first + row) / group_;
    }

    // What row sees of a chunk.
    Range seen(const AttentionItem& item, int64_t row, int chunk) const {
        const int64_t base = (int64_t)chunk * attention_chunk, at = position(item, row) - base;
        const int64_t low = call_.window ? std::max<int64_t>(at - call_.window + 1, 0) : 0;
        return {low, std::min<int64_t>(at + 1, attention_chunk)};
    }

    // What some row of [first, last) sees.
    Range seen_by_any(const AttentionItem& item, int64_t first, int64_t last, int chunk) const {
        return {seen(item, first, chunk).low, seen(item, last - 1, chunk).high};
    }

    Lines lines_of(const AttentionItem& item, int chunk) const {
        Lines lines;
        const Range range = seen_by_any(item, 0, item.row_count, chunk);
        lines.low = range.low;
        lines.high = range.high;
        lines.first = (int)(range.low / line_lanes);
        lines.last = (int)((range.high + line_lanes - 1) / line_lanes);
        const int32_t* table = call_.tables + item.seq * call_.table_stride;
        for (int line = lines.first; line < lines.last; ++line) {
            const int64_t at = (int64_t)chunk * attention_chunk + line * line_lanes;
            const int64_t block = table[at / call_.block_size] * call_.block_stride, offset = at % call_.block_size;
            lines.keys[line] = block + offset * pair;
            lines.values[line] = block + offset * dim_;
        }
        return lines;
    }

    struct Place {
        int64_t token;
        int64_t head;  // of the queries
    };

    Place place_of(int64_t row) const {
        const int64_t head = item_->head_first + row / item_->row_count, among = item_->row_first + row % item_->row_count;
        return {call_.starts[item_->seq] + among / group_, head * group_ + among % group_};
    }

    void load_queries() {
        alignas(64) float rotated[max_head_dim];
        const auto start_of = [&](const Place& at) { return at.token * call_.q_stride + at.head * dim_; };
        for (int64_t row = 0; row < rows_; ++row) {
            if (row + rows_asked_ahead < rows_) expect_numbers(call_.q, start_of(place_of(row + rows_asked_ahead)), dim_, call_.rows);
            const Place at = place_of(row);
            const float* cos_sin = call_.cos_sin + call_.positions[at.token] * dim_;
            Factor* query = queries_ + row * dim_;
            if constexpr (Cache::scaled) {
                rotate(call_.q, start_of(at), call_.rows, cos_sin, dim_, rotated);
                query_scales_[row] = scale_of(rotated, dim_, word_most);
                store_whole(rotated, dim_, query_scales_[row], query);
            } else {
                rotate(call_.q, start_of(at), call_.rows, cos_sin, dim_, rotated, query);
            }
        }
    }

    int64_t tiles() const { return (item_->row_count + highest - 1) / highest; }
    // Tiles of nearly equal height.
    int64_t tile_start(int64_t tile) const { return item_->row_count * tile / tiles(); }

    void score(const Lines& lines, int64_t tile_first, int64_t tile_last) {
        constexpr int step = widest_tile(1);
        for (int line = lines.first; line < lines.last; line += step) {
            for (int64_t head = 0; head < heads_; ++head) {
                for (int64_t tile = tile_first; tile < tile_last; ++tile) {
                    const int64_t row = tile_start(tile);
                    score_rows<1>((int)(tile_start(tile + 1) - row), head, row, lines, line, std::min(line + step, lines.last), tile == 0);
                }
            }
        }
    }

    template <int R>
    void score_rows(int rows, int64_t head, int64_t row, const Lines& lines, int line, int end, bool ask) {
        if constexpr (matrices) {
            shape_rows(shape_, rows);
            each_lines(end - line, [&](auto count, int first) { score_lines<R, count>(head, row, lines, line + first, ask); });
        } else if constexpr (R <= highest_tile) {
            if (rows != R) return score_rows<R + 1>(rows, head, row, lines, line, end, ask);
            while (line < end) {
                const int count = end - line;
                if (widest_tile(R) >= 4 && count >= 3) line += score_lines<R, std::min(4, widest_tile(R))>(head, row, lines, line, ask);
                else if (widest_tile(R) >= 2 && count >= 2) line += score_lines<R, std::min(2, widest_tile(R))>(head, row, lines, line, ask);
                else line += score_lines<R, 1>(head, row, lines, line, ask);
            }
        }
    }

    // The last line stands in for those that a tile has beyond it; their scores are seen by no row.
    template <int R, int L>
    int score_lines(int64_t head, int64_t row, const Lines& lines, int line, bool ask) {
        constexpr int step = widest_tile(1);
        const Stored* k[L];
        const char* ahead[L];
        const int64_t kv_head = item_->head_first + head;
        for (int l = 0; l < L; ++l) {
            const int mine = std::min(line + l, lines.last - 1), next = line + l + step;
            k[l] = keys(kv_head) + lines.keys[mine];
            ahead[l] = (const char*)k[l];
            if (ask && next < lines.last) ahead[l] = (const char*)(keys(kv_head) + lines.values[next]);
            else if (ask) ahead[l] = (const char*)(values(kv_head) + lines.values[std::min(lines.first + next - lines.last, lines.last - 1)]);
        }
        const int64_t at = head * item_->row_count + row;
        float* to = scores_ + at * attention_chunk + line * line_lanes;
        const Factor* q = queries_ + at * dim_;
        const int64_t k_stride = call_.block_size * pair;
        if constexpr (matrices) score_matrix<L>(q, dim_, k, k_stride, dim_, ahead, to, attention_chunk);
        else score_tile<Cache, R, L>(q, dim_, query_scales_ + at, k, k_stride, dim_, ahead, to, attention_chunk);
        return L;
    }

    // Scores to weights e^(scale (score - peak)), 0 where a row does not see; peak and total into the chunk's results.
    void weigh(const Lines& lines, int chunk, float* sums, int64_t tile_first, int64_t tile_last) {
        const int64_t from = lines.first * line_lanes, to = lines.last * line_lanes;
        const int64_t top = tile_start(tile_first), count = tile_start(tile_last) - top;
        for (int64_t i = 0; i < heads_ * count; ++i) {
            const int64_t row = i / count * item_->row_count + top + i % count;
            float* scores = scores_ + row * attention_chunk;
            Factor* weights = (Factor*)scores;
            float* result = sums + row * result_size(dim_);
            const Range range = seen(*item_, row % item_->row_count, chunk);
            if (range.empty()) {
                for (int64_t i = from; i < to; ++i) weights[i] = 0;
                total_of(result, dim_) = 0.0f;
                if constexpr (Cache::scaled) weight_scales_[row] = 0.0f;
                continue;
            }
            if constexpr (Cache::scaled) {
                const Stored* scales = keys(item_->head_first + row / item_->row_count) + (dim_ + pair) * call_.block_size;
                const auto value_scales = [&](int64_t i) SLUICE_HERE {
                    return Simd::load_bf16((const uint16_t*)(scales + lines.keys[i / line_lanes]) + i % line_lanes);
                };
                weight_scales_[row] = weigh_row(scores, range, call_.scale, value_scales, weights, peak_of(result, dim_), total_of(result, dim_));
            } else {
                weigh_row(scores, range, call_.scale, weights, peak_of(result, dim_), total_of(result, dim_));
            }
            for (int64_t i = from; i < range.low; ++i) weights[i] = 0;
            for (int64_t i = range.high; i < to; ++i) weights[i] = 0;
        }
    }

    // One tile of rows a head: block after block, as memory has them, sums kept in the cache. More: each tile's sums in registers.
    void add_values(const Lines& lines, int chunk, float* sums, const Lines* after, const Stored* after_keys, int64_t tile_first,
                    int64_t tile_last) {
        const int step = tiles() == 1 ? 2 : chunk_lines;
        for (int line = lines.first; line < lines.last; line += step) {
            const int end = std::min(line + step, lines.last);
            for (int64_t head = 0; head < heads_; ++head) {
                for (int64_t tile = tile_first; tile < tile_last; ++tile) {
                    const int64_t row = tile_start(tile), bottom = tile_start(tile + 1);
                    const Range range = seen_by_any(*item_, row, bottom, chunk);
                    Stretch<Stored> stretches[chunk_lines + 1];
                    const int count = stretches_of(lines, line, end, head, range, step, after, after_keys, stretches);
                    float* to = sums + (head * item_->row_count + row) * result_size(dim_);
                    add_rows<1>((int)(bottom - row), head, row, stretches, count, line == lines.first, end == lines.last, to);
                }
            }
        }
    }

    int stretches_of(const Lines& lines, int line, int end, int64_t head, Range range, int step, const Lines* after,
                     const Stored* after_keys, Stretch<Stored>* out) {
        const int64_t kv_head = item_->head_first + head;
        int count = 0;
        for (; line < end; ++line) {
            const int64_t start = (int64_t)line * line_lanes;
            const int64_t low = std::max(range.low / pair * pair, start), high = std::min(range.high, start + line_lanes);
            if (low >= high) continue;
            const Stored* whole = values(kv_head) + lines.values[line];
            const Stored* mine = whole + (low - start) * dim_;
            const int next = line + (step == chunk_lines ? 1 : step), beyond = next - lines.last;
            int64_t ahead = 0;
            if (next < lines.last) ahead = (const char*)(values(kv_head) + lines.values[next]) - (const char*)whole;
            else if (after && after->first + beyond < after->last) {
                ahead = (const char*)(after_keys + head * key_stride<Cache>(dim_, call_.block_size) + after->values[after->first + beyond]) -
                        (const char*)whole;
            }
            const int64_t paired = high / pair * pair;
            if (paired > low) out[count++] = {mine, low, paired, ahead};
            if (paired < high) out[count++] = {first_of_pair(whole + (paired - start) * dim_), paired, high, 0};
        }
        return count;
    }

    // A row of pairs whose second numbers belong to an unseen slot, with 0 in their place.
    const Stored* first_of_pair(const Stored* values) {
        for (int64_t i = 0; i < dim_ * pair; ++i) half_pair_[i] = i % pair ? 0 : values[i];
        return half_pair_;
    }

    // The stretches as lines: parts of one with 0 around them.
    int whole_lines(const Stretch<Stored>* stretches, int count, ValueLine* out) {
        const int64_t row = pair * dim_;
        Stored* part = part_lines_;
        int lines = 0, parts = 0;
        for (int i = 0; i < count; ++i) {
            const Stretch<Stored>& from = stretches[i];
            const int64_t start = from.first / line_lanes * line_lanes;
            if (from.last - from.first == line_lanes) {
                out[lines++] = {from.values, start, from.ahead};
                continue;
            }
            if (lines == 0 || out[lines - 1].first != start) {
                part = part_lines_ + parts++ * line_lanes * dim_;
                std::memset(part, 0, (size_t)part_bytes(dim_));
                out[lines++] = {part, start, (const char*)from.values + from.ahead - (const char*)part};
            }
            const int64_t pairs = (from.last - from.first + pair - 1) / pair;
            std::memcpy(part + (from.first - start) / pair * row, from.values, sizeof(Stored) * (size_t)(pairs * row));
        }
        return lines;
    }

    template <int R>
    void add_rows(int rows, int64_t head, int64_t row, const Stretch<Stored>* stretches, int count, bool first, bool last, float* to) {
        const int lines = (int)(dim_ / line_lanes);
        if constexpr (matrices) {
            ValueLine whole[chunk_lines];
            const int found = whole_lines(stretches, count, whole);
            const Factor* weights = (const Factor*)(scores_ + (head * item_->row_count + row) * attention_chunk);
            shape_rows(shape_, rows);
            each_lines(lines, [&](auto at_once, int line) {
                value_matrix<at_once>(weights, weights_stride, whole, found, line * line_lanes, dim_, first, to, result_size(dim_));
            });
        } else if constexpr (R <= highest_tile) {
            if (rows != R) return add_rows<R + 1>(rows, head, row, stretches, count, first, last, to);
            int line = 0;
            constexpr int wide = widest_tile(R), middle = std::min(wide, 2);
            for (; line + wide <= lines; line += wide) add_lines<R, wide>(head, row, line, stretches, count, first, last, to);
            for (; line + middle <= lines; line += middle) add_lines<R, middle>(head, row, line, stretches, count, first, last, to);
            for (; line < lines; ++line) add_lines<R, 1>(head, row, line, stretches, count, first, last, to);
        }
    }

    template <int R, int L>
    void add_lines(int64_t head, int64_t row, int line, const Stretch<Stored>* stretches, int count, bool first, bool last, float* to) {
        const int64_t at = head * item_->row_count + row;
        const Factor* weights = (const Factor*)(scores_ + at * attention_chunk);
        value_tile<Cache, R, L>(weights, weights_stride, stretches, count, line * line_lanes * pair, dim_, first,
                                last ? weight_scales_ + at : nullptr, to + line * line_lanes, result_size(dim_));
    }

    // The last to finish of a unit combines all of its chunks, in order.
    void finish_unit() {
        for (int64_t row = 0; row < rows_; ++row) total_of(state(row), dim_) = 0.0f;
        for (int chunk = item_->unit_chunk_first; chunk < item_->unit_chunk_last; ++chunk) {
            for (int64_t row = 0; row < rows_; ++row) combine(partial(chunk, row), dim_, call_.scale, state(row));
        }
        write();
    }

    void write() {
        for (int64_t row = 0; row < rows_; ++row) {
            const Place at = place_of(row);
            const int64_t start = (at.token * call_.q_heads + at.head) * dim_;
            float* result = state(row);
            const F share = Simd::div(Simd::set1(1.0f), Simd::set1(total_of(result, dim_)));
            for (int64_t d = 0; d < dim_; d += width) {
                store_typed(call_.out, start + d, Simd::mul(Simd::load(result + d), share), width, call_.out_type);
            }
        }
    }

    const Attention& call_;
    const int64_t dim_;
    const int64_t group_;
    float* const partials_;
    int32_t* const unfinished_;
    const AttentionItem* item_ = nullptr;
    int64_t heads_ = 0;
    int64_t rows_ = 0;      // of the item, over its heads
    float* scores_;         // [rows][attention_chunk], then the weights in the same place
    float* sums_;           // [rows][result_size]: weighted sum of values, peak, total of one chunk
    float* state_;          // the same of the chunks so far
    float* query_scales_;   // [rows], of a cache with scales: what a query's whole numbers stand for,
    float* weight_scales_;  // [rows]: and one chunk's weights times their values' scales
    Factor* queries_;       // [rows][dim], rotated
    Stored* part_lines_;    // of matrices: two of [line_lanes / pair][dim][pair]
    Stored* half_pair_;     // [dim][pair]
    [[no_unique_address]] RowShape shape_;
};

template <class Cache>
inline void attend(const Attention& call) {
    const int64_t partial_bytes = round_up(call.partial_rows * result_size(call.dim) * 4, 64);
    uint8_t* shared = scratch(0, partial_bytes + round_up(call.units * 4, 64) + 64);
    float* partials = (float*)shared;
    int32_t* unfinished = (int32_t*)(shared + partial_bytes);
    for (int64_t i = 0; i < call.num_items; ++i) {
        if (call.items[i].unit >= 0) unfinished[call.items[i].unit] = call.items[i].unit_parts;
    }
    if (!call.single_tokens) {
        sluice::parallel_for(call.tokens, tokens_written_at_once, [&](int64_t token) {
            if (token + 1 < call.tokens) expect_token<Cache>(call, token + 1, 0, call.kv_heads);
            write_token<Cache>(call, token, 0, call.kv_heads);
        });
    }
    sluice::parallel(call.num_items, 1, [&](sluice::Share& share) {
        Worker<Cache> worker(call, partials, unfinished, scratch(1, Worker<Cache>::scratch_bytes(call.dim)));
        int64_t first, last, next;
        for (bool more = share.take(first, last); more; first = next) {
            more = share.take(next, last);
            worker.run(call.items[first], more ? call.items + next : nullptr);
        }
    });
}

inline void attention(const Attention& call) {
    if (call.type == Type::bf16) attend<PairedCache>(call);
    else if (call.type == Type::int8) attend<ByteCache>(call);
    else attend<PlainCache>(call);
}

}  // namespace SLUICE_ISA
