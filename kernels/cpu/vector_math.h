// Elementary functions and typed loads over `Simd`. Included once by each isa_*.cpp.
#pragma once

// What is in registers must stay there: a call, or an index that the compiler learns late, would put it in memory.
#define SLUICE_INLINE __attribute__((always_inline)) inline
#define SLUICE_HERE __attribute__((always_inline))

namespace SLUICE_ISA {

using F = Simd::F;
using I = Simd::I;
using sluice::Type;

constexpr int width = Simd::width;

// e^x to about one rounding for x in [-87.3, 88.3], clamped outside, NaN of NaN: range reduction by ln 2 in two parts, then the Taylor series to x^7.
inline F exp(F x) {
    x = Simd::min(Simd::set1(88.37f), Simd::max(Simd::set1(-87.33f), x));
    F n = Simd::round(Simd::mul(x, Simd::set1(1.44269504f)));
    F r = Simd::fma(n, Simd::set1(-0.693359375f), x);
    r = Simd::fma(n, Simd::set1(2.12194440e-4f), r);
    F p = Simd::set1(1.9841270e-4f);
    p = Simd::fma(p, r, Simd::set1(1.3888889e-3f));
    p = Simd::fma(p, r, Simd::set1(8.3333333e-3f));
    p = Simd::fma(p, r, Simd::set1(4.1666667e-2f));
    p = Simd::fma(p, r, Simd::set1(1.6666667e-1f));
    p = Simd::fma(p, r, Simd::set1(0.5f));
    p = Simd::fma(p, r, Simd::set1(1.0f));
    p = Simd::fma(p, r, Simd::set1(1.0f));
    return Simd::mul(p, Simd::power_of_two(n));
}

// The same to 2^-17 in half the time, for what is rounded to far fewer bits: 2^t with t in [-126, 126], whole numbers apart, then the series
// to t^5.
inline F coarse_exp(F x) {
    const F t = Simd::min(Simd::set1(126.0f), Simd::max(Simd::set1(-126.0f), Simd::mul(x, Simd::set1(1.44269504f))));
    const F n = Simd::round(t), r = Simd::sub(t, n);
    F p = Simd::set1(1.33335581e-3f);
    p = Simd::fma(p, r, Simd::set1(9.61812911e-3f));
    p = Simd::fma(p, r, Simd::set1(5.55041087e-2f));
    p = Simd::fma(p, r, Simd::set1(2.40226507e-1f));
    p = Simd::fma(p, r, Simd::set1(6.93147181e-1f));
    p = Simd::fma(p, r, Simd::set1(1.0f));
    return Simd::mul(p, Simd::power_of_two(n));
}

template <bool coarse>
inline F silu(F x) {
    const F minus = Simd::sub(Simd::zero(), x);
    return Simd::div(x, Simd::add(Simd::set1(1.0f), coarse ? coarse_exp(minus) : exp(minus)));
}

inline float bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline uint16_t float_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float read(const void* p, int64_t i, Type type) {
    return type == Type::bf16 ? bf16_to_float(((const uint16_t*)p)[i]) : ((const float*)p)[i];
}

// Lanes [i, i + n) of an array of `type`, 0 < n <= width.
inline F load_typed(const void* p, int64_t i, int n, Type type) {
    if (type == Type::f32) return n == width ? Simd::load((const float*)p + i) : Simd::load_n((const float*)p + i, n);
    const uint16_t* q = (const uint16_t*)p + i;
    if (n == width) return Simd::load_bf16(q);
    uint16_t lanes[width] = {};
    for (int j = 0; j < n; ++j) lanes[j] = q[j];
    return Simd::load_bf16(lanes);
}

inline void store_typed(void* p, int64_t i, F x, int n, Type type) {
    if (type == Type::f32) {
        if (n == width) Simd::store((float*)p + i, x);
        else Simd::store_n((float*)p + i, x, n);
        return;
    }
    uint16_t* q = (uint16_t*)p + i;
    if (n == width) return Simd::store_bf16(q, x);
    uint16_t lanes[width];
    Simd::store_bf16(lanes, x);
    for (int j = 0; j < n; ++j) q[j] = lanes[j];
}

inline int lanes_left(int64_t i, int64_t size) { return size - i < width ? (int)(size - i) : width; }

// 1 / sqrt(mean(x^2) + eps) of one row.
inline float rms_scale(const void* x, int64_t start, int64_t size, float eps, Type type) {
    constexpr int chains = 4;  // sums under way at once, as one waits for itself
    F sums[chains] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    const auto add = [&](F& sum, int64_t i, int n) SLUICE_HERE {
        const F v = load_typed(x, start + i, n, type);
        sum = Simd::fma(v, v, sum);
    };
    int64_t i = 0;
    for (; i + chains * width <= size; i += chains * width) {
        for (int chain = 0; chain < chains; ++chain) add(sums[chain], i + chain * width, width);
    }
    for (int chain = 0; i < size; i += width, ++chain) add(sums[chain], i, lanes_left(i, size));
    return 1.0f / std::sqrt(Simd::sum(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3]))) / (float)size + eps);
}

}  // namespace SLUICE_ISA
