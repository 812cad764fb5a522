// How weights lie in memory: panels of a few vectors of outputs, each a run of [in / step][outputs][step] that a tile reads in order.
//
//   f32   step 1                                  bf16  step 2: pairs
//   fixed step 2: pairs of int16, then a panel's float scales
//   narrow narrow.h: of 8 inputs the numbers of `fixed` in three quarters of its bytes, then the scales
//   int8  step 4: bytes, then a panel's float scales, then int32 128 * sum(w)
//   int4  per group of inputs: step 8, 4 bytes: input i in the low nibble of byte i, input 4 + i in the high one, biased by 8;
//         then half-float scales
//   coarse screen.h
//
// Outputs and inputs are padded with zeros. Gated layers alternate a panel of gate and the panel of up that it multiplies.
// INT8 is symmetric per output: w = scale * q, |q| at most 127, or what the processor's products of bytes are exact for. INT4 is symmetric per
// output and group, q in [-8, 7], the scale chosen so that the value of largest magnitude is met exactly by -8.
//
// Fixed is how bf16 weights are kept where whole numbers are multiplied faster: w = scale * q, one power of two an output, as small as
// keeps the sum of a block of `fixed_block` inputs within 32 bits. Of weights as models have them, what bf16's 8 bits hold is met exactly
// down to a third of their usual size or so, and an error is at most half of q's last place. An output in which a few weights dwarf the
// others would hold those badly: its layer stays in bf16.
#pragma once

namespace SLUICE_ISA {

using sluice::Format;
using sluice::PackedHeader;

constexpr int panel_vectors = Simd::panel_vectors;
constexpr int panel_outputs = panel_vectors * width;

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Whether a row of a product with bf16 weights is rounded to bf16.
constexpr bool bf16_rows = Simd::bf16_dot || Simd::matrices;

// Inputs of one of the fewest equal blocks of at most `most`; a whole number of vectors.
constexpr int64_t equal_blocks(int64_t inputs, int64_t most) {
    int64_t blocks = (inputs + most - 1) / most;
    return round_up((inputs + blocks - 1) / blocks, 16);
}

constexpr bool is_fixed(Format format) { return format == Format::fixed || format == Format::narrow; }

// Inputs of two of a tile's steps, which it makes at once, or of four; or of 16, which a product of matrices does.
inline int input_steps(Format format) {
    if (format == Format::f32) return 2;
    if (Simd::matrices && format == Format::bf16) return 32;
    if (Simd::matrices && format == Format::int8) return 64;
    return format == Format::int8 || format == Format::coarse || is_fixed(format) ? 8 : 4;
}

// A block's sums: |x| <= fixed_row_limit, and magnitudes of q that add up to at most fixed_sum_limit.
constexpr float fixed_row_limit = 16383.0f;
constexpr float fixed_sum_limit = 131071.0f;
constexpr float fixed_weight_limit = 32767.0f;
constexpr int fixed_coarse = 32;          // a q below it may be wrong by more than a sixty-fourth part,
constexpr int fixed_coarse_among = 5;     // which at most one in so many of an output's weights, zeros apart, may be
constexpr float fixed_smallest = 1e-30f;  // where the largest is below, a block's numbers are 0: one divided by it need be no number
static_assert((int64_t)fixed_row_limit * (int64_t)fixed_sum_limit <= INT32_MAX);

constexpr int64_t fixed_block_most = 256;
constexpr int64_t fixed_block(int64_t inputs) { return equal_blocks(inputs, fixed_block_most); }
constexpr int64_t fixed_scale_words = 2;  // of a row's block: the float that its numbers are multiplied by stands first

// Inputs of a panel, padding included.
inline int64_t padded_inputs(Format format, int64_t in_features, int group) {
    return round_up(in_features, format == Format::int4 ? group : input_steps(format));
}

constexpr int64_t group_bytes(int group) { return (int64_t)group / 2 * panel_outputs + 2 * panel_outputs; }

// Of weights of 8 bits beside which others stand: whether their rows have 8 bits too (screen.h).
constexpr bool screens_by_bytes = Simd::byte_limit == 127;
constexpr int64_t coarse_after_bytes = panel_outputs * 4 * (screens_by_bytes ? 5 : 2);

// Bytes of the table that stands before a weight's panels.
inline int64_t table_bytes(Format format, int64_t inputs) {
    return format == Format::coarse && screens_by_bytes ? round_up(inputs * (int64_t)sizeof(int32_t), 64) : 0;
}

inline int64_t panel_size(Format format, int64_t in_features, int group) {
    int64_t inputs = padded_inputs(format, in_features, group);
    int64_t bytes = 0;
    switch (format) {
        case Format::f32: bytes = inputs * panel_outputs * 4; break;
        case Format::bf16: bytes = inputs * panel_outputs * 2; break;
        case Format::fixed: bytes = inputs * panel_outputs * 2 + panel_outputs * 4; break;
        case Format::narrow: bytes = inputs * panel_outputs * 3 / 2 + panel_outputs * 4; break;
        case Format::int8: bytes = inputs * panel_outputs + panel_outputs * 8; break;
        case Format::coarse: bytes = inputs * panel_outputs + coarse_after_bytes; break;
        case Format::int4: bytes = inputs / group * group_bytes(group); break;
    }
    return round_up(bytes, 64);
}

inline int64_t num_panels(int64_t out_features, bool gated) {
    return gated ? 2 * ((out_features / 2 + panel_outputs - 1) / panel_outputs)
                 : (out_features + panel_outputs - 1) / panel_outputs;
}

inline int64_t packed_bytes(Format format, int64_t out_features, int64_t in_features, bool gated, int group) {
    return (int64_t)sizeof(PackedHeader) + table_bytes(format, padded_inputs(format, in_features, group)) +
           num_panels(out_features, gated) * panel_size(format, in_features, group);
}

// The row of the checkpoint's weight behind an output of a panel, -1 for padding.
inline int64_t source_row(int64_t panel, int output, int64_t out_features, bool gated) {
    int64_t limit = gated ? out_features / 2 : out_features;
    int64_t row = (gated ? panel / 2 : panel) * panel_outputs + output;
    return row < limit ? row + (gated && panel % 2 ? limit : 0) : -1;
}

inline uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7bff);  // above the largest half: the largest
    if (magnitude < 0x38800000) {
        float scaled = std::nearbyint(std::fabs(x) * 0x1p24f);
        return (uint16_t)(sign | (uint32_t)scaled);
    }
    uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
    uint32_t half = rounded >> 13;
    return (uint16_t)(sign | (half > 0x7bff ? 0x7bff : half));
}

inline float half_to_float(uint16_t x) {
    int exponent = (x >> 10) & 31, fraction = x & 1023;
    float magnitude = exponent ? std::ldexp((float)(1024 + fraction), exponent - 25) : std::ldexp((float)fraction, -24);
    return x & 0x8000 ? -magnitude : magnitude;
}

// Whether it holds the output's weights well.
inline bool pack_fixed_row(const float* row, int64_t in_features, int output, uint8_t* panel, int64_t inputs) {
    const int64_t block = fixed_block(inputs);
    float largest = 0.0f, wrong = 0.0f;
    double block_largest = 0.0;
    for (int64_t start = 0; start < in_features; start += block) {
        double sum = 0.0;
        for (int64_t k = start; k < std::min(in_features, start + block); ++k) {
            sum += std::fabs(row[k]);
            largest = std::max(largest, std::fabs(row[k]));
            wrong += row[k] * 0.0f;
        }
        block_largest = std::max(block_largest, sum);
    }
    int places = 0;
    if (largest > 0.0f && wrong == 0.0f) {
        // Each of a block's numbers may be half a place larger than its weight.
        const double most = std::min((fixed_sum_limit - (double)block) / block_largest, (double)fixed_weight_limit / largest);
        places = (int)std::clamp(std::floor(std::log2(most)), -126.0, 126.0);
    }
    const float inverse = std::ldexp(1.0f, places);
    int16_t* q = (int16_t*)panel;
    int64_t coarse = 0, some = 0;
    for (int64_t k = 0; k < in_features; ++k) {
        const int value = (int)std::nearbyint(wrong == 0.0f ? row[k] * inverse : 0.0f);
        q[(k / 2 * panel_outputs + output) * 2 + k % 2] = (int16_t)value;
        some += row[k] != 0.0f;
        coarse += row[k] != 0.0f && std::abs(value) < fixed_coarse;
    }
    ((float*)(panel + inputs * panel_outputs * 2))[output] = std::ldexp(1.0f, -places) + wrong;
    return wrong != 0.0f || largest < fixed_smallest || coarse * fixed_coarse_among <= some;
}

inline void pack_int8_row(const float* row, int64_t in_features, int output, uint8_t* panel, int64_t inputs) {
    float largest = 0.0f, wrong = 0.0f;
    for (int64_t k = 0; k < in_features; ++k) {
        largest = std::fmax(largest, std::fabs(row[k]));
        wrong += row[k] * 0.0f;
    }
    const float limit = (float)Simd::byte_limit;
    // An output with a weight that is infinite or no number is no number.
    float scale = largest / limit + wrong, inverse = largest > 0.0f && wrong == 0.0f ? limit / largest : 0.0f;
    int32_t sum = 0;
    int8_t* q = (int8_t*)panel;
    for (int64_t k = 0; k < in_features; ++k) {
        int value = wrong == 0.0f ? (int)std::nearbyint(row[k] * inverse) : 0;
        sum += value;
        q[(k / 4 * panel_outputs + output) * 4 + k % 4] = (int8_t)value;
    }
    ((float*)(panel + inputs * panel_outputs))[output] = scale;
    ((int32_t*)(panel + inputs * panel_outputs + 4 * panel_outputs))[output] = 128 * sum;
}

constexpr uint16_t half_nan = 0x7e00;

inline void pack_int4_row(const float* row, int64_t in_features, int output, int group, uint8_t* panel) {
    for (int64_t start = 0; start < in_features; start += group, panel += group_bytes(group)) {
        int64_t end = start + group < in_features ? start + group : in_features;
        float extreme = 0.0f, wrong = 0.0f;
        for (int64_t k = start; k < end; ++k) {
            if (std::fabs(row[k]) > std::fabs(extreme)) extreme = row[k];
            wrong += row[k] * 0.0f;
        }
        // A group with a weight that is infinite or no number has no number for its scale.
        uint16_t half = wrong == 0.0f ? float_to_half(extreme / -8.0f) : half_nan;
        float scale = half_to_float(half), inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
        ((uint16_t*)(panel + (int64_t)group / 2 * panel_outputs))[output] = half;
        for (int64_t k = 0; k < group; ++k) {
            float value = 0.0f;
            if (start + k < end) value = std::fmax(-8.0f, std::fmin(std::nearbyint(row[start + k] * inverse), 7.0f));
            uint8_t nibble = (uint8_t)((int)value + 8);
            uint8_t& both = panel[(k / 8 * panel_outputs + output) * 4 + k % 4];
            both = k % 8 >= 4 ? (uint8_t)(both | nibble << 4) : nibble;
        }
    }
}

// Of a panel in fixed point. False: it does not hold one of the numbers (narrow.h).
inline bool pack_narrow_panel(const uint8_t* fixed, int64_t inputs, uint8_t* panel);

// Whether the format holds the panel's weights well. `row`: [in_features], room for weights; `fixed`: room for such a panel if it is narrow.
inline bool pack_panel(const void* weight, Type type, const PackedHeader& header, int64_t index, uint8_t* panel, float* row, uint8_t* fixed) {
    Format format = header.format;
    int64_t in = header.in_features;
    bool well = true;
    for (int output = 0; output < panel_outputs; ++output) {
        int64_t source = source_row(index, output, header.out_features, header.gated);
        for (int64_t k = 0; k < in; ++k) row[k] = source < 0 ? 0.0f : read(weight, source * in + k, type);
        switch (format) {
            case Format::f32:
                for (int64_t k = 0; k < in; ++k) ((float*)panel)[k * panel_outputs + output] = row[k];
                break;
            case Format::bf16:
                for (int64_t k = 0; k < in; ++k) {
                    ((uint16_t*)panel)[(k / 2 * panel_outputs + output) * 2 + k % 2] = float_to_bf16(row[k]);
                }
                break;
            case Format::fixed: well &= pack_fixed_row(row, in, output, panel, header.inputs); break;
            case Format::narrow: well &= pack_fixed_row(row, in, output, fixed, header.inputs); break;
            case Format::int8: pack_int8_row(row, in, output, panel, header.inputs); break;
            case Format::int4: pack_int4_row(row, in, output, header.group, panel); break;
            case Format::coarse: break;  // screen.h
        }
    }
    return well && (format != Format::narrow || pack_narrow_panel(fixed, header.inputs, panel));
}

inline bool pack(const void* weight, Type type, Format format, int64_t out_features, int64_t in_features, bool gated, int group,
                 void* packed) {
    PackedHeader header{};
    header.magic = sluice::packed_magic;
    header.format = format;
    header.panel = panel_outputs;
    header.group = format == Format::int4 ? group : 0;
    header.out_features = out_features;
    header.in_features = in_features;
    header.inputs = padded_inputs(format, in_features, group);
    header.gated = gated;
    header.byte_limit = format == Format::int8 ? Simd::byte_limit : 0;
    header.panels = sizeof(PackedHeader);
    header.panel_bytes = panel_size(format, in_features, group);
    std::memcpy(packed, &header, sizeof header);
    uint8_t* panels = (uint8_t*)packed + header.panels;
    int64_t count = num_panels(out_features, gated);
    bool well = true;
    sluice::parallel(count, std::max<int64_t>(65536 / header.panel_bytes, 1), [&](sluice::Share& share) {
        std::vector<float> row((size_t)in_features);
        std::vector<uint8_t> fixed(format == Format::narrow ? (size_t)panel_size(Format::fixed, in_features, 0) : 0);
        for (int64_t first, last; share.take(first, last);) {
            for (int64_t i = first; i < last && __atomic_load_n(&well, __ATOMIC_RELAXED); ++i) {
                uint8_t* panel = panels + i * header.panel_bytes;
                std::memset(panel, 0, (size_t)header.panel_bytes);
                if (!pack_panel(weight, type, header, i, panel, row.data(), fixed.data())) __atomic_store_n(&well, false, __ATOMIC_RELAXED);
            }
        }
    });
    return well;
}

}  // namespace SLUICE_ISA
