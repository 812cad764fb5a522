// The rows of a linear's input in the form that its tile multiplies: normed, widened or quantised, padded with zeros.
#pragma once

namespace SLUICE_ISA {

using sluice::Linear;

// take(i, n, x) for the vectors of one row of the input, [0, in): normed when the call says so.
template <class Take>
inline void each_of_row(const Linear& call, int64_t row, int64_t in, const Take& take) {
    const int64_t start = row * in;
    const F scale = Simd::set1(call.norm_weight ? rms_scale(call.x, start, in, call.eps, call.x_type) : 1.0f);
    const auto one = [&](int64_t i, int n) SLUICE_HERE {
        F x = load_typed(call.x, start + i, n, call.x_type);
        if (call.norm_weight) x = Simd::mul(Simd::mul(x, scale), load_typed(call.norm_weight, i, n, call.x_type));
        take(i, n, x);
    };
    int64_t i = 0;
    for (; i + width <= in; i += width) one(i, width);
    if (i < in) one(i, (int)(in - i));
}

// Rounded only to what `out` is of.
template <Type to>
inline void read_row_as(const Linear& call, int64_t row, int64_t in, void* out) {
    each_of_row(call, row, in, [&](int64_t i, int n, F x) SLUICE_HERE { store_typed(out, i, x, n, to); });
}

inline void read_row(const Linear& call, int64_t row, int64_t in, float* out) { read_row_as<Type::f32>(call, row, in, out); }

inline void prepare_row(const Linear& call, int64_t row, int64_t in, int64_t inputs, float* out, float*, float*) {
    read_row(call, row, in, out);
    for (int64_t i = in; i < inputs; ++i) out[i] = 0.0f;
}

// bf16 for dot products (uint16_t).
inline void prepare_row(const Linear& call, int64_t row, int64_t in, int64_t inputs, uint16_t* out, float*, float*) {
    read_row_as<Type::bf16>(call, row, in, out);
    for (int64_t i = in; i < inputs; ++i) out[i] = 0;
}

inline F magnitude(F x) { return Simd::max(x, Simd::sub(Simd::zero(), x)); }

// Fixed point (int16_t), block by block: the block's scale as a float, then round(x / scale). A block of an infinite or no number has no
// number for its scale, so that its whole row has none.
inline void prepare_row(const Linear& call, int64_t row, int64_t in, int64_t inputs, int16_t* out, float* floats, float*) {
    read_row(call, row, in, floats);
    const int64_t block = fixed_block(inputs), padded = round_up(in, width);
    for (int64_t i = in; i < padded; ++i) floats[i] = 0.0f;
    for (int64_t start = 0; start < inputs; start += block, out += fixed_scale_words + block) {
        const int64_t end = std::min(padded, start + block);
        F found = Simd::zero(), wrong = Simd::zero();
        for (int64_t i = start; i < end; i += width) {
            const F x = Simd::load(floats + i);
            found = Simd::max(magnitude(x), found);
            wrong = Simd::fma(x, Simd::zero(), wrong);
        }
        float largest = Simd::largest(found);
        if (!(largest > fixed_smallest)) largest = 0.0f;
        const F inverse = Simd::set1(largest > 0.0f ? fixed_row_limit / largest : 0.0f);
        int16_t* numbers = out + fixed_scale_words - start;
        for (int64_t i = start; i < end; i += width) Simd::store_words(numbers + i, Simd::mul(Simd::load(floats + i), inverse));
        for (int64_t i = end; i < std::min(inputs, start + block); ++i) numbers[i] = 0;
        const float row_scale = largest / fixed_row_limit + Simd::sum(wrong);
        std::memcpy(out, &row_scale, sizeof row_scale);
    }
}

// The largest magnitude of floats [0, count).
inline float largest_magnitude(const float* x, int64_t count) {
    F found = Simd::zero();
    for (int64_t i = 0; i < count; i += width) found = Simd::max(magnitude(load_typed(x, i, lanes_left(i, count), Type::f32)), found);
    return Simd::largest(found);
}

// int8 and int4: symmetric to 8 bits by the row's largest magnitude, plus 128 for products of unsigned bytes. A row with an infinite or no
// number has no number for its scale.
inline void prepare_row(const Linear& call, int64_t row, int64_t in, int64_t inputs, uint8_t* out, float* floats, float* scale) {
    F found = Simd::zero(), wrong = Simd::zero();
    each_of_row(call, row, in, [&](int64_t i, int n, F x) SLUICE_HERE {
        store_typed(floats, i, x, n, Type::f32);
        found = Simd::max(magnitude(x), found);
        wrong = Simd::fma(x, Simd::zero(), wrong);
    });
    const float largest = Simd::largest(found);
    *scale = largest / 127.0f + Simd::sum(wrong);
    const F inverse = Simd::set1(largest > 0.0f ? 127.0f / largest : 0.0f), excess = Simd::set1(128.0f);
    const auto quantised = [&](F x) SLUICE_HERE { return Simd::add(Simd::round(Simd::mul(x, inverse)), excess); };
    int64_t i = 0;
    for (; i + width <= in; i += width) Simd::store_bytes(out + i, quantised(Simd::load(floats + i)));
    if (i < in) {
        uint8_t last[width];
        Simd::store_bytes(last, quantised(load_typed(floats, i, (int)(in - i), Type::f32)));
        std::memcpy(out + i, last, (size_t)(in - i));
        i = in;
    }
    for (; i < inputs; ++i) out[i] = 128;
}

}  // namespace SLUICE_ISA
