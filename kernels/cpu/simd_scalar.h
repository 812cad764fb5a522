// Eight lanes in plain C++, for a processor without AVX2 (and for other architectures); the compiler vectorises what it can.
// Meanings: simd_avx2.h. Products and sums are rounded apart (no fused multiply-add).
#pragma once

namespace SLUICE_ISA {

struct Simd {
    static constexpr int width = 8;
    static constexpr int panel_vectors = 2;
    static constexpr int tile_rows = 2;
    static constexpr bool bf16_dot = false;
    static constexpr bool matrices = false;
    static constexpr bool fixed_point = false;
    static constexpr int byte_limit = 127;
    static constexpr bool reads_ahead = false;
    static constexpr int64_t bytes_ahead = 0;
    static constexpr bool narrow = false;
    static constexpr bool screens = false;

    struct F {
        float lane[8];
    };
    struct I {
        int32_t lane[8];
    };

    template <class Lane>
    static F each(Lane f) {
        F out;
        for (int i = 0; i < width; ++i) out.lane[i] = f(i);
        return out;
    }
    template <class Lane>
    static I each_lane(Lane f) {
        I out;
        for (int i = 0; i < width; ++i) out.lane[i] = f(i);
        return out;
    }
    static float as_float(uint32_t bits) {
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    static uint32_t as_bits(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits;
    }

    static F zero() { return set1(0.0f); }
    static F set1(float x) { return each([&](int) { return x; }); }
    static F load(const float* p) { return each([&](int i) { return p[i]; }); }
    static void store(float* p, F x) { std::memcpy(p, x.lane, sizeof x.lane); }
    static F add(F a, F b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
    static F sub(F a, F b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
    static F mul(F a, F b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
    static F div(F a, F b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
    static F max(F a, F b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
    static F min(F a, F b) { return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
    static F fma(F a, F b, F c) { return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
    static F round(F a) { return each([&](int i) { return std::nearbyint(a.lane[i]); }); }

    static F load_n(const float* p, int n) { return each([&](int i) { return i < n ? p[i] : 0.0f; }); }
    static void store_n(float* p, F x, int n) { std::memcpy(p, x.lane, sizeof(float) * n); }

    static F load_bf16(const uint16_t* p) { return each([&](int i) { return as_float((uint32_t)p[i] << 16); }); }
    static void store_bf16(uint16_t* p, F x) {
        for (int i = 0; i < width; ++i) {
            uint32_t bits = as_bits(x.lane[i]);
            uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
            p[i] = (uint16_t)((x.lane[i] != x.lane[i] ? 0x7fc00000u : rounded) >> 16);
        }
    }

    static void store_bytes(uint8_t* p, F x) {
        for (int i = 0; i < width; ++i) p[i] = (uint8_t)x.lane[i];
    }

    static void store_words(int16_t* p, F x) {
        for (int i = 0; i < width; ++i) p[i] = (int16_t)std::nearbyint(x.lane[i]);
    }

    static I load_lanes(const void* p) {
        I out;
        std::memcpy(out.lane, p, sizeof out.lane);
        return out;
    }
    static void store_lanes(void* p, I x) { std::memcpy(p, x.lane, sizeof x.lane); }
    static I set1_lane(const void* p) {
        int32_t lane;
        std::memcpy(&lane, p, 4);
        return each_lane([&](int) { return lane; });
    }
    static I widen_bytes(const void* p) {
        int8_t bytes[2 * width];
        std::memcpy(bytes, p, sizeof bytes);
        return each_lane([&](int i) { return (int32_t)((uint32_t)(uint16_t)bytes[2 * i] | (uint32_t)(uint16_t)bytes[2 * i + 1] << 16); });
    }
    static F low(I pairs) { return each([&](int i) { return as_float((uint32_t)pairs.lane[i] << 16); }); }
    static F high(I pairs) { return each([&](int i) { return as_float((uint32_t)pairs.lane[i] & 0xffff0000u); }); }

    static void hold(I&) {}
    static void hold(F&) {}
    static I zero_lanes() { return each_lane([](int) { return 0; }); }
    static F to_float(I lanes) { return each([&](int i) { return (float)lanes.lane[i]; }); }
    static I sub_lanes(I a, I b) { return each_lane([&](int i) { return a.lane[i] - b.lane[i]; }); }
    static I times_128(I x) { return each_lane([&](int i) { return x.lane[i] * 128; }); }
    static I low_nibbles(I x) {
        return each_lane([&](int i) {
            uint32_t out = 0;
            for (int shift = 0; shift < 32; shift += 8) out |= (uint32_t)(uint8_t)((x.lane[i] >> shift & 15) - 8) << shift;
            return (int32_t)out;
        });
    }
    static I high_nibbles(I x) {
        return low_nibbles(each_lane([&](int i) { return (int32_t)((uint32_t)x.lane[i] >> 4); }));
    }
    static F add_product(F sum, F a, F b) { return fma(a, b, sum); }
    static I add_pair_products(I sum, I a, I b) {
        return each_lane([&](int i) {
            return sum.lane[i] + (int16_t)a.lane[i] * (int16_t)b.lane[i] + (a.lane[i] >> 16) * (b.lane[i] >> 16);
        });
    }
    static I add_byte_products(I sum, I a, I b) {
        return each_lane([&](int i) {
            for (int shift = 0; shift < 32; shift += 8) sum.lane[i] += (uint8_t)(a.lane[i] >> shift) * (int8_t)(b.lane[i] >> shift);
            return sum.lane[i];
        });
    }
    static I add_small_products(I sum, I a, I b) { return add_byte_products(sum, a, b); }
    static I widen_small(I sum) { return sum; }
    static I widen_words(I words);  // defined where `narrow` is true
    static I widen_holes(I first, I second, I third);
    static F add_bf16_products(F sum, I a, I b);  // defined where bf16_dot is true
    static F load_half(const uint16_t* p) {
        return each([&](int i) {
            uint32_t sign = (uint32_t)(p[i] & 0x8000) << 16, exponent = (p[i] >> 10) & 31, fraction = p[i] & 1023;
            if (exponent == 0) return as_float(sign) + (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
            if (exponent == 31) return as_float(sign | 0x7f800000u | (fraction << 13));
            return as_float(sign | ((exponent + 112) << 23) | (fraction << 13));
        });
    }

    static float sum(F x) {
        float four[4];
        for (int i = 0; i < 4; ++i) four[i] = x.lane[i] + x.lane[i + 4];
        return (four[0] + four[2]) + (four[1] + four[3]);
    }
    static float largest(F x) {
        float found = x.lane[0];
        for (int i = 1; i < width; ++i) found = x.lane[i] > found ? x.lane[i] : found;
        return found;
    }
    static bool any_not_below(F x, F limit) {
        bool found = false;
        for (int i = 0; i < width; ++i) found |= !(x.lane[i] < limit.lane[i]);
        return found;
    }
    static F add_where_not_above(F sum, F x, F limit, F w) {
        return each([&](int i) { return sum.lane[i] + (x.lane[i] <= limit.lane[i] ? w.lane[i] : 0.0f); });
    }
    static uint32_t lanes_between(F x, F low, F high) {
        uint32_t found = 0;
        for (int i = 0; i < width; ++i) found |= (uint32_t)(low.lane[i] < x.lane[i] && x.lane[i] <= high.lane[i]) << i;
        return found;
    }
    static F power_of_two(F n) { return each([&](int i) { return as_float((uint32_t)((int)n.lane[i] + 127) << 23); }); }
};

}  // namespace SLUICE_ISA
