// A second, coarse copy of a weight, and what a product with it may differ by from the product with the weight itself.
//
// With y a row after its norm, as the weight's product takes it, w an output's weights as they are multiplied, ^w those in 8 bits, D = w - ^w,
// ^y the row in the numbers of screen_tiles.h and |.| the Euclidean norm, Cauchy and Schwarz say of the sums without rounding
//
//   |y.w - ^y.^w|  =  |y.D + (y - ^y).^w|  <=  |y| |D| + |y - ^y| |^w|
//
// where |y - ^y| is known of each row in bytes; of one in pairs it is at most |y| sqrt(in) / 2 / fixed_row_limit, since a row's step is its
// largest number's share. A weight in fixed point multiplies a row that is as far from y itself; where that is the very ^y, block for block,
// the second term is 0. What both products round is a share of |y| |w|: a rounding of at most `unit` of a sum that no partial sum exceeds,
// as often as the longer of the two rounds. So an output's bound is |y| and |y - ^y| times two numbers that are known when the weight is
// packed, computed in doubles and rounded up. It holds for rows and outputs whose numbers neither overflow nor vanish on the way; other
// outputs are bounded by infinity, and other rows are not to be screened.
//
// A panel is [in / step][outputs][step] bytes; of rows in pairs step is 2, then float scales, then float bounds a |y|; of rows in bytes it is 4,
// screen_tiles.h says what follows, and an int32 a place stands before the panels: the input that was put there.
#pragma once

namespace SLUICE_ISA {

constexpr double unit = 0x1p-24;               // half a last place of 1 in float
constexpr float screened_row_least = 0x1p-20f; // of |y|
constexpr float screened_row_most = 0x1p20f;
constexpr double screened_weight_most = 0x1p20;
constexpr float coarse_limit = 127.0f;

// At least |y| of a row [in]; infinite where it is not to be screened.
inline float reach_of(const float* y, int64_t in) {
    F sum = Simd::zero();
    for (int64_t i = 0; i < in; i += width) {
        const F x = load_typed(y, i, lanes_left(i, in), Type::f32);
        sum = Simd::fma(x, x, sum);
    }
    const float reach = std::sqrt(Simd::sum(sum)) * (1.0f + (float)(in + 64) * (float)(2.0 * unit));
    return reach >= screened_row_least && reach <= screened_row_most ? reach : INFINITY;
}

// Output `output` of a panel, input k, as it is multiplied by.
inline double weight_at(const PackedHeader& header, const uint8_t* panel, int output, int64_t k) {
    if (header.format == Format::f32) return ((const float*)panel)[k * panel_outputs + output];
    const int64_t at = (k / 2 * panel_outputs + output) * 2 + k % 2;
    if (header.format == Format::bf16) return bf16_to_float(((const uint16_t*)panel)[at]);
    const bool narrow = header.format == Format::narrow;
    const float* scales = (const float*)(panel + (narrow ? narrow_offset(header.inputs) : header.inputs * panel_outputs * 2));
    return (double)(narrow ? narrow_number(panel, output, k) : ((const int16_t*)panel)[at]) * scales[output];
}

inline float rounded_up(double bound) { return (float)(bound * (1.0 + 0x1p-10) + 0x1p-40); }

// A bound of an output for |y| = 1, of |D| and the greater of |w| and |^w|.
inline float bound_of(const PackedHeader& header, double difference, double weight) {
    const double in = (double)header.in_features;
    const double row_step = 0.502 * std::sqrt(in) / fixed_row_limit + 0x1p-22;
    double share = 4.0 * (in + 40.0) * unit;  // of |y| |w|: each product and each sum of the two may be rounded, and their scales
    if (screens_by_bytes == is_fixed(header.format)) share += row_step;
    if (!screens_by_bytes && header.format == Format::bf16 && bf16_rows) share += 1.01 * 0x1p-8;  // the row is rounded to bf16
    return rounded_up(difference * (1.0 + row_step) + weight * share);
}

// `place`: where in a panel each input stands.
inline void pack_coarse_row(const PackedHeader& header, const double* row, const int32_t* place, int output, uint8_t* panel, int64_t inputs) {
    constexpr int step = screens_by_bytes ? 4 : 2;
    double largest = 0.0, wrong = 0.0;
    for (int64_t k = 0; k < header.in_features; ++k) {
        largest = std::max(largest, std::fabs(row[k]));
        wrong += row[k] * 0.0;
    }
    float* scales = (float*)(panel + inputs * panel_outputs);
    float* bounds = scales + (screens_by_bytes ? 3 : 1) * panel_outputs;
    if (wrong != 0.0 || largest > screened_weight_most) {
        bounds[output] = INFINITY;
        return;
    }
    const float scale = (float)largest / coarse_limit;
    double difference = 0.0, exact = 0.0, coarse = 0.0;
    int32_t fine_sum = 0, sum = 0;
    for (int64_t k = 0; k < header.in_features; ++k) {
        const double q = scale > 0.0f ? std::clamp(std::nearbyint(row[k] / scale), -(double)coarse_limit, (double)coarse_limit) : 0.0;
        ((int8_t*)panel)[(place[k] / step * panel_outputs + output) * step + place[k] % step] = (int8_t)q;
        (place[k] < fine_inputs(inputs) ? fine_sum : sum) += (int32_t)q;
        difference += (row[k] - q * scale) * (row[k] - q * scale);
        exact += row[k] * row[k];
        coarse += q * scale * q * scale;
    }
    scales[output] = scale;
    bounds[output] = bound_of(header, std::sqrt(difference), std::sqrt(std::max(exact, coarse)));
    if (!screens_by_bytes) return;
    int32_t* excess = (int32_t*)(scales + panel_outputs);
    excess[output] = 128 * 129 * fine_sum;
    excess[panel_outputs + output] = 128 * sum;
    bounds[panel_outputs + output] = rounded_up(std::sqrt(coarse));
}

// Of each input the squares of its weights over all outputs, times its norm weight's.
inline void weigh_inputs(const PackedHeader& header, const uint8_t* panels, const void* norm_weight, Type type, double* weights) {
    constexpr int64_t at_once = 16;  // so that what lies together is read together
    sluice::parallel(header.in_features, at_once, [&](sluice::Share& share) {
        for (int64_t first, last; share.take(first, last);) {
            std::fill(weights + first, weights + last, 0.0);
            for (int64_t i = 0; i < num_panels(header.out_features, false); ++i) {
                for (int64_t k = first; k < last; ++k) {
                    for (int output = 0; output < panel_outputs; ++output) {
                        const double w = weight_at(header, panels + i * header.panel_bytes, output, k);
                        weights[k] += w * w;
                    }
                }
            }
            for (int64_t k = first; k < last && norm_weight; ++k) weights[k] *= std::pow((double)read(norm_weight, k, type), 2);
        }
    });
}

// order[place], the input to stand there: those of the greatest weights first, as many as are fine, then the others. Takes the weights' room.
inline void order_inputs(double* weights, int64_t in_features, int64_t fine, int32_t* order) {
    int64_t place = 0;
    for (; place < std::min(fine, in_features); ++place) {
        int64_t most = -1;
        for (int64_t k = 0; k < in_features; ++k) {
            // Where they are no numbers any order will do.
            if (weights[k] != -1.0 && (most < 0 || weights[k] > weights[most])) most = k;
        }
        order[place] = (int32_t)most;
        weights[most] = -1.0;
    }
    for (int64_t k = 0; k < in_features; ++k) {
        if (weights[k] != -1.0) order[place++] = (int32_t)k;
    }
}

inline void pack_screen(const void* packed, const void* norm_weight, Type type, void* screen) {
    const PackedHeader& exact = *(const PackedHeader*)packed;
    PackedHeader header = exact;
    header.format = Format::coarse;
    header.group = screens_by_bytes && exact.format == Format::bf16 && bf16_rows;
    header.inputs = padded_inputs(Format::coarse, exact.in_features, 0);
    header.panels = (int64_t)sizeof(PackedHeader) + table_bytes(Format::coarse, header.inputs);
    header.panel_bytes = panel_size(Format::coarse, exact.in_features, 0);
    std::memcpy(screen, &header, sizeof header);
    const uint8_t* from = (const uint8_t*)packed + exact.panels;
    uint8_t* to = (uint8_t*)screen + header.panels;
    std::vector<int32_t> place((size_t)exact.in_features);
    std::iota(place.begin(), place.end(), 0);
    if (screens_by_bytes) {
        int32_t* order = (int32_t*)((PackedHeader*)screen + 1);
        std::vector<double> weights((size_t)exact.in_features);
        weigh_inputs(exact, from, norm_weight, type, weights.data());
        order_inputs(weights.data(), exact.in_features, fine_inputs(header.inputs), order);
        for (int64_t i = 0; i < exact.in_features; ++i) place[(size_t)order[i]] = (int32_t)i;
    }
    sluice::parallel(num_panels(exact.out_features, false), std::max<int64_t>(65536 / header.panel_bytes, 1), [&](sluice::Share& share) {
        std::vector<double> row((size_t)exact.in_features);
        for (int64_t first, last; share.take(first, last);) {
            for (int64_t i = first; i < last; ++i) {
                uint8_t* panel = to + i * header.panel_bytes;
                std::memset(panel, 0, (size_t)header.panel_bytes);
                for (int output = 0; output < panel_outputs; ++output) {
                    if (source_row(i, output, exact.out_features, false) < 0) {
                        ((float*)(panel + header.inputs * panel_outputs))[(screens_by_bytes ? 3 : 1) * panel_outputs + output] = -INFINITY;
                        continue;
                    }
                    for (int64_t k = 0; k < exact.in_features; ++k) row[(size_t)k] = weight_at(exact, from + i * exact.panel_bytes, output, k);
                    pack_coarse_row(exact, row.data(), place.data(), output, panel, header.inputs);
                }
            }
        }
    });
}

}  // namespace SLUICE_ISA
