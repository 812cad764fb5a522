// The inner products: R rows times C panels, every output summed in one accumulator in the order of the inputs.
//
// R, C and the row's place in a tile therefore cannot change a result. `a`: rows as prepare.h made them, `stride` elements apart;
// `w`: the first of C panels, `panel_bytes` apart; `out`: float [R][C * panel_outputs].
#pragma once

// Sums must stay in registers: a call, or an index that the compiler learns late, would put them in memory.
#define SLUICE_INLINE __attribute__((always_inline)) inline
#define SLUICE_HERE __attribute__((always_inline))

namespace SLUICE_ISA {

// How far ahead of the weights being multiplied the next ones are asked for, for tiles so short that memory is what they wait for.
constexpr int prefetch_bytes = 2048;

// body(0) ... body(N - 1) in line, each index a constant.
template <int N, class Body>
SLUICE_INLINE void each(Body body) {
    [&]<int... i>(std::integer_sequence<int, i...>) SLUICE_HERE {
        (body(std::integral_constant<int, i>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

template <int R, int V>
SLUICE_INLINE void store_tile(const F (&sum)[R][V], float* out) {
    each<R>([&](auto r) SLUICE_HERE { each<V>([&](auto v) SLUICE_HERE { Simd::store(out + (r * V + v) * width, sum[r][v]); }); });
}

template <int R, int V>
SLUICE_INLINE void clear_tile(F (&sum)[R][V]) {
    each<R>([&](auto r) SLUICE_HERE { each<V>([&](auto v) SLUICE_HERE { sum[r][v] = Simd::zero(); }); });
}

template <int R, int V>
SLUICE_INLINE void clear_tile(I (&sum)[R][V]) {
    each<R>([&](auto r) SLUICE_HERE { each<V>([&](auto v) SLUICE_HERE { sum[r][v] = Simd::zero_lanes(); }); });
}

// sum[r][v] = term(sum[r][v], factor(r), vector(v)), the fewer of the two held in registers. `hold` keeps the compiler from loading
// all of the others first, for which it would put sums in memory.
template <int R, int V, class Sum, class Factor, class Vector, class Term>
SLUICE_INLINE void add_products(Sum (&sum)[R][V], Factor factor, Vector vector, Term term) {
    if constexpr (V <= R) {
        decltype(vector(0)) b[V];
        each<V>([&](auto v) SLUICE_HERE { b[v] = vector(v); });
        each<R>([&](auto r) SLUICE_HERE {
            const auto a = factor(r);
            each<V>([&](auto v) SLUICE_HERE {
                sum[r][v] = term(sum[r][v], a, b[v]);
                Simd::hold(sum[r][v]);
            });
        });
    } else {
        decltype(factor(0)) a[R];
        each<R>([&](auto r) SLUICE_HERE { a[r] = factor(r); });
        each<V>([&](auto v) SLUICE_HERE {
            const auto b = vector(v);
            each<R>([&](auto r) SLUICE_HERE {
                sum[r][v] = term(sum[r][v], a[r], b);
                Simd::hold(sum[r][v]);
            });
        });
    }
}

// Weights to ask for while others are multiplied: `step` bytes further for each 64 bytes of a panel that the tile has read.
struct Ahead {
    const uint8_t* at;
    int64_t step;
};

// One call a step of `bytes` read from each panel. Low tiles ask for each of their own C panels a little ahead; high ones, whose panel is
// in the cache after the first of them, share in asking for the next panel.
template <int R, int C>
SLUICE_INLINE void prefetch(const uint8_t* at, int64_t panel_bytes, int bytes, Ahead& ahead) {
    if constexpr (C > 1 || R == 1) {
        each<C>([&](auto c) SLUICE_HERE {
            for (int b = 0; b < bytes; b += 64) __builtin_prefetch(at + c * panel_bytes + b + prefetch_bytes);
        });
    } else {
        for (int b = 0; b < bytes; b += 64) {
            __builtin_prefetch(ahead.at);
            ahead.at += ahead.step;
        }
    }
}

// Vector v of a step that begins at `at`, over C panels; `lane_bytes` a lane.
template <int lane_bytes>
SLUICE_INLINE const uint8_t* vector_at(const uint8_t* at, int64_t panel_bytes, int v) {
    return at + v / panel_vectors * panel_bytes + v % panel_vectors * width * lane_bytes;
}

constexpr auto add_product = [](F sum, F x, F weights) SLUICE_HERE { return Simd::fma(x, weights, sum); };

struct FloatTile {
    using Row = float;
    static constexpr int max_rows = Simd::tile_rows;

    template <int R, int C>
    static void run(const float* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, float* out) {
        constexpr int V = panel_vectors * C;
        F sum[R][V];
        clear_tile(sum);
        const uint8_t* at = w;
        for (int64_t k = 0; k < inputs; ++k, at += panel_outputs * 4) {
            prefetch<R, C>(at, panel_bytes, panel_outputs * 4, ahead);
            add_products(
                sum, [&](int r) SLUICE_HERE { return Simd::set1(a[r * stride + k]); },
                [&](int v) SLUICE_HERE { return Simd::load((const float*)vector_at<4>(at, panel_bytes, v)); }, add_product);
        }
        store_tile(sum, out);
    }
};

struct Bf16Tile {
    using Row = std::conditional_t<Simd::bf16_dot, uint16_t, float>;
    static constexpr int max_rows = Simd::tile_rows;

    template <int R, int C>
    static void run(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, float* out) {
        constexpr int V = panel_vectors * C;
        F sum[R][V];
        clear_tile(sum);
        const uint8_t* at = w;
        for (int64_t k = 0; k < inputs; k += 2, at += panel_outputs * 4) {
            prefetch<R, C>(at, panel_bytes, panel_outputs * 4, ahead);
            if constexpr (Simd::bf16_dot) {
                add_products(
                    sum, [&](int r) SLUICE_HERE { return Simd::set1_lane(a + r * stride + k); },
                    [&](int v) SLUICE_HERE { return Simd::load_lanes(vector_at<4>(at, panel_bytes, v)); },
                    [](F s, I x, I b) SLUICE_HERE { return Simd::add_bf16_products(s, b, x); });
            } else {
                // Sums and rows leave no register for what load_high would hold: without it 3 rows take two thirds of the time.
                constexpr bool full = V > R && R * V == max_rows * panel_vectors;
                add_products(
                    sum, [&](int r) SLUICE_HERE { return Simd::set1(a[r * stride + k]); },
                    [&](int v) SLUICE_HERE { return Simd::load_low(vector_at<4>(at, panel_bytes, v)); }, add_product);
                add_products(
                    sum, [&](int r) SLUICE_HERE { return Simd::set1(a[r * stride + k + 1]); },
                    [&](int v) SLUICE_HERE {
                        const uint8_t* pairs = vector_at<4>(at, panel_bytes, v);
                        return full ? Simd::high(Simd::load_lanes(pairs)) : Simd::load_high(pairs);
                    },
                    add_product);
            }
        }
        store_tile(sum, out);
    }
};

// Inputs whose products with 4-bit weights Simd::add_small_products may sum: 32 * 255 * 8 / 2 fits 16 bits.
constexpr int nibbles_summed = 32;

// Rows are unsigned, 128 too high: what that adds is taken off at the end.
struct Int8Tile {
    using Row = uint8_t;
    static constexpr int max_rows = Simd::tile_rows;

    template <int R, int C>
    static void run(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, float* out) {
        constexpr int V = panel_vectors * C;
        I sum[R][V];
        clear_tile(sum);
        const uint8_t* at = w;
        for (int64_t k = 0; k < inputs; k += 4, at += panel_outputs * 4) {
            prefetch<R, C>(at, panel_bytes, panel_outputs * 4, ahead);
            add_products(
                sum, [&](int r) SLUICE_HERE { return Simd::set1_lane(a + r * stride + k); },
                [&](int v) SLUICE_HERE { return Simd::load_lanes(vector_at<4>(at, panel_bytes, v)); },
                [](I s, I x, I b) SLUICE_HERE { return Simd::add_byte_products(s, x, b); });
        }
        each<V>([&](auto v) SLUICE_HERE {
            const float* scale = (const float*)vector_at<4>(at, panel_bytes, v);
            const F factor = Simd::load(scale);
            const I excess = Simd::load_lanes(scale + panel_outputs);
            each<R>([&](auto r) SLUICE_HERE {
                Simd::store(out + (r * V + v) * width, Simd::mul(Simd::to_float(Simd::sub_lanes(sum[r][v], excess)), factor));
            });
        });
    }
};

// Rows as in Int8Tile. Products of up to 32 inputs are summed in whatever small numbers the processor sums fastest, then scaled.
struct Int4Tile {
    using Row = uint8_t;
    static constexpr int max_rows = Simd::tile_rows * 2 / 3;  // the excess takes registers too

    template <int R, int C>
    static void run(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int group, Ahead ahead, float* out) {
        constexpr int V = panel_vectors * C;
        static const uint8_t excess_bytes[4] = {128, 128, 128, 128};
        const I excess_row = Simd::set1_lane(excess_bytes);
        const int together = group % nibbles_summed ? nibbles_summed / 2 : nibbles_summed;
        F total[R][V];
        clear_tile(total);
        const uint8_t* at = w;
        for (int64_t start = 0; start < inputs; start += group) {
            const uint8_t* scales = at + (int64_t)group / 2 * panel_outputs;
            for (int64_t k = start; k < start + group; k += together) {
                I sum[R][V], excess[1][V];
                clear_tile(sum);
                clear_tile(excess);
                for (int64_t i = k; i < k + together; i += 8, at += panel_outputs * 4) {
                    prefetch<R, C>(at, panel_bytes, panel_outputs * 4, ahead);
                    each<2>([&](auto half) SLUICE_HERE {
                        add_products(
                            sum, [&](int r) SLUICE_HERE { return Simd::set1_lane(a + r * stride + i + 4 * half); },
                            [&](int v) SLUICE_HERE {
                                const I both = Simd::load_lanes(vector_at<4>(at, panel_bytes, v));
                                const I b = half ? Simd::high_nibbles(both) : Simd::low_nibbles(both);
                                excess[0][v] = Simd::add_small_products(excess[0][v], excess_row, b);
                                Simd::hold(excess[0][v]);
                                return b;
                            },
                            [](I s, I x, I b) SLUICE_HERE { return Simd::add_small_products(s, x, b); });
                    });
                }
                each<V>([&](auto v) SLUICE_HERE {
                    const F scale = Simd::load_half((const uint16_t*)vector_at<2>(scales, panel_bytes, v));
                    const I high = Simd::widen_small(excess[0][v]);
                    each<R>([&](auto r) SLUICE_HERE {
                        const F exact = Simd::to_float(Simd::sub_lanes(Simd::widen_small(sum[r][v]), high));
                        total[r][v] = Simd::fma(exact, scale, total[r][v]);
                    });
                });
            }
            at += 2 * panel_outputs;
        }
        store_tile(total, out);
    }
};

}  // namespace SLUICE_ISA
