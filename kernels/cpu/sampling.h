// Logits to tokens: greedy, or temperature, top-k, top-p, min-p and one draw by inverse CDF in token-id order. Meanings, tie rules and
// what is summed in which precision: kernels/reference.py.
//
// Nothing is sorted but a few hundred candidates. With d = (best - x) / temperature >= 0 a token's weight is exp(-d), and a filter keeps
// d <= limit: top-k is the least limit that keeps k tokens, top-p the least that keeps its share of the mass. Both come from one search
// that sums under several trial limits in one pass and narrows the range of limits until few tokens lie in it.
#pragma once

namespace SLUICE_ISA {

using sluice::Logprobs;
using sluice::Sample;

constexpr int64_t sum_block = 64;     // weights summed in float before double takes over, as the reference does
constexpr int64_t rung_block = 256;   // the same for trial sums, whose rounding errors are independent
constexpr int rungs = width == 16 ? 15 : 7;
constexpr int64_t few = 256;          // candidates that are sorted rather than narrowed further
constexpr float never = INFINITY;

struct Best {
    float value;
    int64_t index;
};

// The greatest value of a row and its first index; NaN as soon as the row holds one.
inline Best best_of(const float* x, int64_t size) {
    Best best{-never, 0};
    for (int64_t i = 0; i < size; i += sum_block) {
        int64_t end = std::min(i + sum_block, size);
        bool above = end - i < sum_block;
        F limit = Simd::set1(best.value);
        for (int64_t j = i; j + width <= end; j += width) above |= Simd::any_not_below(Simd::load(x + j), limit);
        if (!above) continue;
        for (int64_t j = i; j < end; ++j) {
            if (x[j] != x[j]) return {x[j], j};
            if (x[j] > best.value) best = {x[j], j};
        }
    }
    return best;
}

inline bool is_finite(float x) { return x - x == 0.0f; }

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float of_bits(int64_t bits) {
    uint32_t low = (uint32_t)bits;
    float x;
    std::memcpy(&x, &low, 4);
    return x;
}

// exp(-d); 0 where float has no normal number for it.
inline F weight_of(F d) {
    F zero = Simd::zero();
    return Simd::add_where_not_above(zero, d, Simd::set1(87.0f), exp(Simd::sub(zero, d)));
}

// Distances and weights of a row's tokens, both [size], size a multiple of rung_block; `weights` null: each counts 1.
struct Candidates {
    const float* distances;
    const float* weights;
    int64_t size;
};

// sums[i] = weight of the candidates within limits[i].
inline void sums_within(const Candidates& all, const float* limits, double* sums) {
    for (int i = 0; i < rungs; ++i) sums[i] = 0.0;
    const F one = Simd::set1(1.0f);
    for (int64_t start = 0; start < all.size; start += rung_block) {
        F sum[rungs];
        each<rungs>([&](auto i) SLUICE_HERE { sum[i] = Simd::zero(); });
        for (int64_t j = start; j < start + rung_block; j += width) {
            const F d = Simd::load(all.distances + j), w = all.weights ? Simd::load(all.weights + j) : one;
            each<rungs>([&](auto i) SLUICE_HERE { sum[i] = Simd::add_where_not_above(sum[i], d, Simd::set1(limits[i]), w); });
        }
        each<rungs>([&](auto i) SLUICE_HERE { sums[i] += (double)Simd::sum(sum[i]); });
    }
}

// The candidates with low < distance <= high, nearest first, as (distance bits, weight bits); -1 when they are more than `few`.
inline int sorted_between(const Candidates& all, float low, float high, uint64_t* found) {
    int count = 0;
    F lower = Simd::set1(low), upper = Simd::set1(high);
    for (int64_t j = 0; j < all.size; j += width) {
        uint32_t lanes = Simd::lanes_between(Simd::load(all.distances + j), lower, upper);
        for (; lanes; lanes &= lanes - 1) {
            if (count == few) return -1;
            int64_t at = j + __builtin_ctz(lanes);
            uint64_t weight = all.weights ? bits_of(all.weights[at]) : bits_of(1.0f);
            found[count++] = (uint64_t)bits_of(all.distances[at]) << 32 | weight;
        }
    }
    std::sort(found, found + count);
    return count;
}

// The least limit within which the candidates weigh `wanted`; `outer` when those within it, `outer_sum` in all, never do.
// `near`: a limit within which few candidates lie, looked at first.
inline float limit_for(const Candidates& all, float near, float outer, double outer_sum, double wanted) {
    if (!(outer_sum >= wanted)) return outer;
    // A limit is searched among the bit patterns of positive floats, which stand in the order of their values. It lies in (low, high].
    int64_t low = -1, high = bits_of(outer);
    double low_sum = 0.0, high_sum = outer_sum;
    uint64_t found[few];
    // Walks from `low` to `end` when few candidates lie between; gives the limit if that reaches `wanted`, else -1.
    auto walk = [&](int64_t end) {
        int count = sorted_between(all, low < 0 ? -1.0f : of_bits(low), of_bits(end), found);
        if (count < 0) return -1.0f;
        double sum = low_sum;
        for (int i = 0; i < count; ++i) {
            sum += (double)of_bits((int64_t)(found[i] & 0xffffffffu));
            if (sum >= wanted) return of_bits((int64_t)(found[i] >> 32));
        }
        if (end == high) return of_bits(high);  // the two sums of the same weights were rounded apart
        low = end, low_sum = sum;
        return -1.0f;
    };
    if (near < outer || all.size <= few) {
        float limit = walk(std::min<int64_t>(bits_of(near), high));
        if (limit >= 0.0f) return limit;
    }
    // Most limits lie within these powers of two, so that is where the first rungs stand.
    int64_t from = std::max<int64_t>(low, bits_of(0.0625f)), to = std::min<int64_t>(bits_of(64.0f), high);
    if (to <= from) from = low, to = high;
    while (true) {
        double most = (high_sum - low_sum) * (all.weights ? std::exp((double)of_bits(high)) : 1.0);
        if (most <= (double)few) {
            float limit = walk(high);
            if (limit >= 0.0f) return limit;
        }
        if (high - low <= 1) return of_bits(high);
        float limits[rungs];
        double sums[rungs];
        for (int i = 0; i < rungs; ++i) limits[i] = of_bits(std::max<int64_t>(from + (to - from) * (i + 1) / (rungs + 1), 0));
        sums_within(all, limits, sums);
        for (int i = 0; i < rungs; ++i) {
            int64_t bits = bits_of(limits[i]);
            if (bits <= low || bits >= high) continue;
            if (sums[i] >= wanted) {
                high = bits, high_sum = sums[i];
            } else {
                low = bits, low_sum = sums[i];
            }
        }
        from = low, to = high;
    }
}

// Memory of one thread: distances, weights, block sums.
struct SampleSpace {
    int64_t padded;
    float* distances;
    float* weights;
    double* sums;
    bool filled = false;  // with every token's distance and weight

    explicit SampleSpace(int64_t size) : padded(round_up(size, rung_block)) {
        distances = (float*)scratch(1, padded * 8 + round_up(size, sum_block) / sum_block * 8);
        weights = distances + padded;
        sums = (double*)(weights + padded);
    }
};

// One row on its way to a token.
struct Row {
    const float* x;
    int64_t size;
    float best;
    float heat;  // 1 / temperature

    // Distances of tokens [i, i + n), +inf beyond the row.
    F distance(int64_t i) const {
        int n = i < size ? lanes_left(i, size) : 0;
        if (n == width) return Simd::mul(Simd::sub(Simd::set1(best), Simd::load(x + i)), Simd::set1(heat));
        float lanes[width];
        for (int j = 0; j < width; ++j) lanes[j] = j < n ? (best - x[i + j]) * heat : never;
        return Simd::load(lanes);
    }

    // sums[b] = weight of block b's tokens within `limit`; gives their total. `space`: of distances and weights of every token, or null.
    double block_sums(float limit, double* sums, const SampleSpace* space = nullptr) const {
        double total = 0.0;
        F upper = Simd::set1(limit), none = Simd::set1(-1.0f);
        if (space) {
            for (int64_t i = 0, b = 0; i < size; i += sum_block, ++b) {
                F sum = Simd::zero();
                for (int64_t j = i; j < i + sum_block; j += width) {
                    sum = Simd::add_where_not_above(sum, Simd::load(space->distances + j), upper, Simd::load(space->weights + j));
                }
                sums[b] = (double)Simd::sum(sum);
                total += sums[b];
            }
            return total;
        }
        for (int64_t i = 0, b = 0; i < size; i += sum_block, ++b) {
            F sum = Simd::zero();
            for (int64_t j = i; j < i + sum_block; j += width) {
                F d = distance(j);
                if (limit < never && !Simd::lanes_between(d, none, upper)) continue;
                sum = Simd::add_where_not_above(sum, d, upper, weight_of(d));
            }
            sums[b] = (double)Simd::sum(sum);
            total += sums[b];
        }
        return total;
    }

    // The first token at which the running sum of weights within `limit` passes uniform x total.
    int64_t draw(float limit, double uniform, const SampleSpace& space) const {
        double* sums = space.sums;
        double total = block_sums(limit, sums, space.filled ? &space : nullptr);
        double target = std::min(uniform * total, std::nextafter(total, 0.0));
        int64_t last_block = (size - 1) / sum_block, block = 0;
        double before = 0.0;
        while (block < last_block && before + sums[block] <= target) before += sums[block++];
        F upper = Simd::set1(limit);
        float weights[sum_block];
        for (int64_t j = 0; j < sum_block; j += width) {
            F d = distance(block * sum_block + j);
            Simd::store(weights + j, Simd::add_where_not_above(Simd::zero(), d, upper, weight_of(d)));
        }
        // The two sums may round differently: stay on the block's last token that has weight.
        int64_t passed = 0, last = 0;
        double running = 0.0;
        for (int64_t j = 0; j < sum_block; ++j) {
            running += (double)weights[j];
            if (before + running <= target) ++passed;
            if (weights[j] > 0.0f) last = j;
        }
        return block * sum_block + std::min(passed, last);
    }
};

// Weights of the distances [0, size), a multiple of sum_block; gives their total.
inline double fill_weights(SampleSpace& space, int64_t size) {
    double total = 0.0;
    for (int64_t start = 0; start < size; start += sum_block) {
        F sum = Simd::zero();
        for (int64_t i = start; i < start + sum_block; i += width) {
            const F weight = weight_of(Simd::load(space.distances + i));
            Simd::store(space.weights + i, weight);
            sum = Simd::add(sum, weight);
        }
        total += (double)Simd::sum(sum);
    }
    return total;
}

// Keeps the distances within `limit` alone, in order, padded to rung_block; gives how many with the padding.
inline int64_t keep_within(SampleSpace& space, float limit) {
    int64_t count = 0;
    F none = Simd::set1(-1.0f), upper = Simd::set1(limit);
    for (int64_t j = 0; j < space.padded; j += width) {
        uint32_t lanes = Simd::lanes_between(Simd::load(space.distances + j), none, upper);
        for (; lanes; lanes &= lanes - 1) space.distances[count++] = space.distances[j + __builtin_ctz(lanes)];
    }
    int64_t padded = round_up(count, rung_block);
    while (count < padded) space.distances[count++] = never;
    return padded;
}

// The `count`-th least of the blocks' nearest distances: at least `count` candidates lie within it, and rarely many more.
inline float near_limit(SampleSpace& space, int64_t count) {
    float* nearest = space.weights;
    int64_t blocks = 0;
    for (int64_t start = 0; start < space.padded; start += sum_block) {
        F least = Simd::load(space.distances + start);
        for (int64_t j = start + width; j < start + sum_block; j += width) least = Simd::min(least, Simd::load(space.distances + j));
        nearest[blocks++] = 0.0f - Simd::largest(Simd::sub(Simd::zero(), least));  // never -0, whose bits are not those of 0
    }
    if (count > blocks / 2) return never;
    std::nth_element(nearest, nearest + count - 1, nearest + blocks);
    return nearest[count - 1];
}

// The largest distance that top-k, then top-p over what top-k kept, then min-p let through.
inline float limit_of(const Row& row, double top_k, double top_p, double min_p, SampleSpace& space) {
    float limit = min_p > 0.0 ? -(float)std::log(min_p) : never;
    bool counts = top_k > 0.0 && top_k < (double)row.size, weighs = top_p < 1.0;
    if (!counts && !weighs) return limit;
    for (int64_t i = 0; i < space.padded; i += width) Simd::store(space.distances + i, row.distance(i));
    float by_count = never;
    if (counts) {
        float near = near_limit(space, (int64_t)top_k);
        by_count = limit_for({space.distances, nullptr, space.padded}, near, never, (double)space.padded, top_k);
        limit = std::min(limit, by_count);
    }
    if (!weighs) return limit;
    Candidates kept{space.distances, space.weights, space.padded};
    float near = never;
    if (counts) kept.size = keep_within(space, by_count);
    else near = near_limit(space, few / 2);
    double total = fill_weights(space, kept.size);
    space.filled = !counts;
    if (counts && kept.size > few) {
        total = row.block_sums(by_count, space.sums);
    } else if (kept.size <= few) {
        total = 0.0;
        for (int64_t i = 0; i < kept.size; ++i) total += (double)space.weights[i];
    }
    return std::min(limit, limit_for(kept, near, by_count, total, top_p * total));
}

// A number in [0, 1) of 53 random bits: Philox4x32-10 (Salmon et al. 2011) of (position, choice) under the seed.
inline double uniform_of(uint64_t seed, uint64_t choice, uint64_t position) {
    uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = (uint32_t)choice, c3 = 0x534C5543u;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; ++i) {
        uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (double)((uint64_t)c0 << 21 | c1 >> 11) * 0x1p-53;
}

inline int64_t sample_row(const float* x, int64_t size, const double* filters, const int64_t* draw) {
    Best best = best_of(x, size);
    if (!is_finite(best.value)) return -1;
    double temperature = filters[0];
    if (temperature == 0.0) return best.index;
    SampleSpace space(size);
    Row row{x, size, best.value, (float)(1.0 / temperature)};
    float limit = limit_of(row, filters[1], filters[2], filters[3], space);
    return row.draw(limit, uniform_of((uint64_t)draw[0], (uint64_t)draw[1], (uint64_t)draw[2]), space);
}

inline void greedy(const float* logits, int64_t rows, int64_t size, int64_t* tokens) {
    sluice::parallel_for(rows, 1, [&](int64_t r) {
        Best best = best_of(logits + r * size, size);
        tokens[r] = is_finite(best.value) ? best.index : -1;
    });
}

inline void sample(const Sample& call) {
    sluice::parallel_for(call.rows, 1, [&](int64_t r) {
        call.tokens[r] = sample_row(call.logits + r * call.vocab, call.vocab, call.filters + r * 4, call.draws + r * 3);
    });
}

// log softmax of one row at `token` and at its `count` best tokens, best first, equal ones in the order of their ids.
inline void logprobs_row(const Logprobs& call, int64_t r) {
    const float* x = call.logits + r * call.vocab;
    Best best = best_of(x, call.vocab);
    SampleSpace space(call.vocab);
    Row row{x, call.vocab, best.value, 1.0f};
    double log_total = std::log(row.block_sums(never, space.sums));
    auto logprob = [&](int64_t token) { return (float)((double)x[token] - (double)best.value - log_total); };
    int64_t count = call.count;
    call.chosen[r] = logprob(call.tokens[r]);
    if (count == 0) return;
    int64_t* ids = call.top_ids + r * count;
    // Insertion into a short list: what enters is above its last, so later equals stay behind.
    int64_t kept = 0;
    for (int64_t i = 0; i < call.vocab; i += width) {
        int n = lanes_left(i, call.vocab);
        if (kept == count && n == width && !Simd::any_not_below(Simd::load(x + i), Simd::set1(x[ids[count - 1]]))) continue;
        for (int64_t j = i; j < i + n; ++j) {
            if (kept == count && !(x[j] > x[ids[count - 1]])) continue;
            int64_t at = kept < count ? kept++ : count - 1;
            while (at > 0 && x[j] > x[ids[at - 1]]) {
                ids[at] = ids[at - 1];
                --at;
            }
            ids[at] = j;
        }
    }
    for (int64_t i = 0; i < count; ++i) call.top[r * count + i] = logprob(ids[i]);
}

inline void logprobs(const Logprobs& call) {
    sluice::parallel_for(call.rows, 1, [&](int64_t r) { logprobs_row(call, r); });
}

}  // namespace SLUICE_ISA
