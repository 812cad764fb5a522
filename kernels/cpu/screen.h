// A second, coarse copy of a weight, and what a product with it may differ by from the product with the weight itself.
//
// With y a row after its norm, w an output's weights as they are multiplied, ^y and ^w both in fixed point (16 bits and 8 bits), D = w - ^w
// and |.| the Euclidean norm, Cauchy and Schwarz say of the sums without rounding
//
//   |y.w - ^y.^w|  =  |y.D + (y - ^y).^w|  <=  |y| |D| + |y - ^y| |^w|
//
// where |y - ^y| <= |y| sqrt(in) / 2 / fixed_row_limit, since a row's step is its largest number's share. Where the weight itself is in
// fixed point its row is the same ^y, block for block, and the second term is 0. What both products round is a share of |y| |w|: a rounding
// of at most `unit` of a sum that no partial sum exceeds, as often as the longer of the two rounds. So the bound of an output is |y| times a
// number that is known when the weight is packed, computed in doubles and rounded up. It holds for rows and outputs whose numbers neither
// overflow nor vanish on the way; other outputs are bounded by infinity, and other rows are not to be screened.
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
    return (double)((const int16_t*)panel)[at] * ((const float*)(panel + header.inputs * panel_outputs * 2))[output];
}

// A bound of an output for |y| = 1, of |D| and the greater of |w| and |^w|.
inline float bound_of(const PackedHeader& header, double difference, double weight) {
    const double in = (double)header.in_features;
    const double row_step = 0.502 * std::sqrt(in) / fixed_row_limit + 0x1p-22;
    double share = 4.0 * (in + 32.0) * unit;  // of |y| |w|: each product and each sum of the two may be rounded, and their scales
    if (header.format != Format::fixed) share += row_step;
    if (header.format == Format::bf16 && bf16_rows) share += 1.01 * 0x1p-8;  // the row is rounded to bf16
    return (float)((difference * (1.0 + row_step) + weight * share) * (1.0 + 0x1p-10) + 0x1p-40);
}

inline void pack_coarse_row(const PackedHeader& header, const double* row, int output, uint8_t* panel, int64_t inputs) {
    double largest = 0.0, wrong = 0.0;
    for (int64_t k = 0; k < header.in_features; ++k) {
        largest = std::max(largest, std::fabs(row[k]));
        wrong += row[k] * 0.0;
    }
    float* scales = (float*)(panel + inputs * panel_outputs);
    float* bounds = scales + panel_outputs;
    if (wrong != 0.0 || largest > screened_weight_most) {
        bounds[output] = INFINITY;
        return;
    }
    const float scale = (float)largest / coarse_limit;
    double difference = 0.0, exact = 0.0, coarse = 0.0;
    for (int64_t k = 0; k < header.in_features; ++k) {
        const double q = scale > 0.0f ? std::clamp(std::nearbyint(row[k] / scale), -(double)coarse_limit, (double)coarse_limit) : 0.0;
        ((int8_t*)panel)[(k / 2 * panel_outputs + output) * 2 + k % 2] = (int8_t)q;
        difference += (row[k] - q * scale) * (row[k] - q * scale);
        exact += row[k] * row[k];
        coarse += q * scale * q * scale;
    }
    scales[output] = scale;
    bounds[output] = bound_of(header, std::sqrt(difference), std::sqrt(std::max(exact, coarse)));
}

inline void pack_screen(const void* packed, void* screen) {
    const PackedHeader& exact = *(const PackedHeader*)packed;
    PackedHeader header = exact;
    header.format = Format::coarse;
    header.inputs = padded_inputs(Format::coarse, exact.in_features, 0);
    header.panel_bytes = panel_size(Format::coarse, exact.in_features, 0);
    std::memcpy(screen, &header, sizeof header);
    const uint8_t* from = (const uint8_t*)packed + exact.panels;
    uint8_t* to = (uint8_t*)screen + header.panels;
    sluice::parallel(num_panels(exact.out_features, false), std::max<int64_t>(65536 / header.panel_bytes, 1), [&](sluice::Share& share) {
        double* row = (double*)std::malloc(sizeof(double) * (size_t)exact.in_features);
        for (int64_t first, last; share.take(first, last);) {
            for (int64_t i = first; i < last; ++i) {
                uint8_t* panel = to + i * header.panel_bytes;
                std::memset(panel, 0, (size_t)header.panel_bytes);
                for (int output = 0; output < panel_outputs; ++output) {
                    if (source_row(i, output, exact.out_features, false) < 0) {
                        ((float*)(panel + header.inputs * panel_outputs))[panel_outputs + output] = -INFINITY;
                        continue;
                    }
                    for (int64_t k = 0; k < exact.in_features; ++k) row[k] = weight_at(exact, from + i * exact.panel_bytes, output, k);
                    pack_coarse_row(exact, row, output, panel, header.inputs);
                }
            }
        }
        std::free(row);
    });
}

}  // namespace SLUICE_ISA
