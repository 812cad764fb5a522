// What attention does with one row of one chunk: scores to weights, and results of chunks to one.
//
// A result is [dim] floats, the weighted sum of values, then the peak of the scores and the total of the weights; a total of 0 says that
// the row saw nothing.
#pragma once

namespace SLUICE_ISA {

inline int64_t result_size(int64_t dim) { return dim + line_lanes; }
inline float& peak_of(float* result, int64_t dim) { return result[dim]; }
inline float& total_of(float* result, int64_t dim) { return result[dim + 1]; }

struct Range {
    int64_t low;
    int64_t high;
    bool empty() const { return low >= high; }
};

// Lanes [low, high) of x, 0 elsewhere.
inline F only(F x, int64_t low, int64_t high) {
    float lanes[width];
    Simd::store(lanes, x);
    for (int i = 0; i < width; ++i) {
        if (i < low || i >= high) lanes[i] = 0.0f;
    }
    return Simd::load(lanes);
}

// Stores weights; returns them as rounded.
inline F keep(float* to, F x) {
    Simd::store(to, x);
    return x;
}

inline F keep(uint16_t* to, F x) {
    Simd::store_bf16(to, x);
    return Simd::load_bf16(to);
}

// Weights e^(scale (score - peak)) of positions `range`, which is not empty, in whole vectors: keep(i, weight, inside) of each, where
// inside(x) is x with 0 around the range; it gives the weight that counts.
template <bool coarse, class Keep>
inline void each_weight(float* scores, Range range, float scale, float& peak, float& total, const Keep& keep) {
    const int64_t first = range.low / width * width, last = (range.high + width - 1) / width * width;
    for (int64_t i = first; i < range.low; ++i) scores[i] = -INFINITY;
    for (int64_t i = range.high; i < last; ++i) scores[i] = -INFINITY;
    F largest = Simd::load(scores + first);
    for (int64_t i = first + width; i < last; i += width) largest = Simd::max(Simd::load(scores + i), largest);
    peak = Simd::largest(largest);
    const F shift = Simd::set1(peak), factor = Simd::set1(scale);
    F sum = Simd::zero();
    for (int64_t i = first; i < last; i += width) {
        const F below = Simd::mul(Simd::sub(Simd::load(scores + i), shift), factor);
        const bool whole = i >= range.low && i + width <= range.high;
        const auto inside = [&](F x) SLUICE_HERE { return whole ? x : only(x, range.low - i, range.high - i); };
        sum = Simd::add(sum, keep(i, inside(coarse ? coarse_exp(below) : exp(below)), inside));
    }
    total = Simd::sum(sum);
}

// Scores to weights; `weights` may begin where the scores do.
template <class Factor>
inline void weigh_row(float* scores, Range range, float scale, Factor* weights, float& peak, float& total) {
    each_weight<!std::is_same_v<Factor, float>>(scores, range, scale, peak, total,
                                                [&](int64_t i, F weight, const auto&) SLUICE_HERE { return keep(weights + i, weight); });
}

// The same for values with scales, value_scales(i) of positions [i, i + width): weights times these, as whole numbers. Gives what one of
// them stands for.
template <class Scales>
inline float weigh_row(float* scores, Range range, float scale, const Scales& value_scales, int16_t* weights, float& peak, float& total) {
    each_weight<true>(scores, range, scale, peak, total, [&](int64_t i, F weight, const auto& inside) SLUICE_HERE {
        Simd::store(scores + i, inside(Simd::mul(weight, value_scales(i))));
        return weight;
    });
    const int64_t first = range.low / width * width, count = (range.high + width - 1) / width * width - first;
    const float unit = scale_of(scores + first, count, word_most);
    store_whole(scores + first, count, unit, weights + first);
    return unit;
}

// Adds a chunk's result to what earlier chunks gave.
inline void combine(float* result, int64_t dim, float scale, float* into) {
    if (total_of(result, dim) == 0.0f) return;
    if (total_of(into, dim) == 0.0f) {
        std::memcpy(into, result, sizeof(float) * result_size(dim));
        return;
    }
    const F before = Simd::set1(peak_of(into, dim)), now = Simd::set1(peak_of(result, dim));
    const F peak = Simd::max(before, now), factor = Simd::set1(scale);
    const F keep = exp(Simd::mul(Simd::sub(before, peak), factor)), take = exp(Simd::mul(Simd::sub(now, peak), factor));
    for (int64_t d = 0; d < dim; d += width) {
        Simd::store(into + d, Simd::fma(Simd::load(into + d), keep, Simd::mul(Simd::load(result + d), take)));
    }
    alignas(64) float lanes[width];
    Simd::store(lanes, Simd::fma(Simd::set1(total_of(into, dim)), keep, Simd::mul(Simd::set1(total_of(result, dim)), take)));
    total_of(into, dim) = lanes[0];
    Simd::store(lanes, peak);
    peak_of(into, dim) = lanes[0];
}

}  // namespace SLUICE_ISA
