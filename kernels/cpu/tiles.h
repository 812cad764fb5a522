// The inner products: R rows times C panels over one block of inputs, every output summed in one accumulator in the order of the inputs.
//
// R, C and the row's place in a tile therefore cannot change a result. A tile says
//
//   Row, row_block(inputs)  what rows.h makes of a row, and elements of it that a block of inputs takes
//   block_inputs(inputs)    inputs of a block, the most that are multiplied at once
//   part_inputs(group)      what inputs that are multiplied at once are a multiple of, if they are not all; 0: they are always all
//   row_offset(k, inputs)   elements before input k in a row
//   panel_offset(k, group)  bytes before input k in a panel; what stands for all inputs comes after the last
//   add<R, C, asks>(a, stride, w, panel_bytes, inputs, group, ahead, goes_on, sums)
//                           multiplies them: `a` rows `stride` elements apart, `w` in the first of C panels `panel_bytes` apart, `sums`
//                           [R][C * panel_outputs], lanes of 32 bits, which hold those of the inputs before if it `goes_on`
//   Room                    how a block is kept for tiles after the first, and which tile takes it
//   waits_for_memory        whether two tiles take less time than a block's way from memory
//   total(sums, after, v)   vector v of a panel's sums in floats, `after` the panel's inputs
#pragma once

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
SLUICE_INLINE void store_tile(const F (&sum)[R][V], float* sums) {
    each<R>([&](auto r) SLUICE_HERE { each<V>([&](auto v) SLUICE_HERE { Simd::store(sums + (r * V + v) * width, sum[r][v]); }); });
}

template <int R, int V>
SLUICE_INLINE void store_tile(const I (&sum)[R][V], float* sums) {
    each<R>([&](auto r) SLUICE_HERE { each<V>([&](auto v) SLUICE_HERE { Simd::store_lanes(sums + (r * V + v) * width, sum[r][v]); }); });
}

// Held: known to be zeros, they would be treated apart in the first step.
template <int R, int V>
SLUICE_INLINE void clear_tile(F (&sum)[R][V]) {
    each<R>([&](auto r) SLUICE_HERE { each<V>([&](auto v) SLUICE_HERE { Simd::hold(sum[r][v] = Simd::zero()); }); });
}

template <int R, int V>
SLUICE_INLINE void clear_tile(I (&sum)[R][V]) {
    each<R>([&](auto r) SLUICE_HERE { each<V>([&](auto v) SLUICE_HERE { Simd::hold(sum[r][v] = Simd::zero_lanes()); }); });
}

// From the sums of the inputs before, if it goes on.
template <int R, int V>
SLUICE_INLINE void begin_tile(F (&sum)[R][V], bool goes_on, const float* sums) {
    if (!goes_on) return clear_tile(sum);
    each<R>([&](auto r) SLUICE_HERE {
        each<V>([&](auto v) SLUICE_HERE { Simd::hold(sum[r][v] = Simd::load(sums + (r * V + v) * width)); });
    });
}

template <int R, int V>
SLUICE_INLINE void begin_tile(I (&sum)[R][V], bool goes_on, const float* sums) {
    if (!goes_on) return clear_tile(sum);
    each<R>([&](auto r) SLUICE_HERE {
        each<V>([&](auto v) SLUICE_HERE { Simd::hold(sum[r][v] = Simd::load_lanes(sums + (r * V + v) * width)); });
    });
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

// What a panel holds of one step's inputs.
constexpr int step_bytes = panel_outputs * 4;

// Weights to ask for while others are multiplied: `step` bytes further for each line that the tile asks for. `kept`: where the first of several
// tiles leaves the block for the others, if they do not take it as it is.
struct Ahead {
    const uint8_t* at;
    int64_t step;
    uint8_t* kept;
};

// What a tile asks for: alone with its block; one of several, into the first cache; one of two that wait for memory, each of which brings
// half a panel, into the second: so much would push what they multiply out of the first.
enum class Asks { alone, near, far };

// Once for `steps` steps of each panel. Low tiles ask for each of their own C panels a little ahead; high ones, whose panel is in the cache
// after the first of them, for what comes a panel later, or Simd::bytes_ahead where a tile is alone. Those that share a block ask for half
// as many lines each: what a tile does beside its products counts.
template <int R, int C, Asks asks, int steps>
SLUICE_INLINE void prefetch(const uint8_t* at, int64_t panel_bytes, Ahead& ahead) {
    if constexpr (C > 1 || R == 1) {
        each<C>([&](auto c) SLUICE_HERE {
            each<(steps * step_bytes + 63) / 64>([&](auto i) SLUICE_HERE {
                __builtin_prefetch(at + c * panel_bytes + i * 64 + prefetch_bytes);
            });
        });
    } else if constexpr (asks != Asks::alone || !Simd::reads_ahead) {
        constexpr int stride = asks == Asks::alone ? 64 : 128;
        each<(steps * step_bytes + stride - 1) / stride>([&](auto) SLUICE_HERE {
            __builtin_prefetch(ahead.at, 0, asks == Asks::far ? 2 : 3);
            ahead.at += ahead.step;
        });
    }
}

// Addresses of rows, each in a register: the compiler would rather compute some anew for every step.
template <class Row, int R>
struct RowsAt {
    const Row* row[R];

    SLUICE_INLINE RowsAt(const Row* a, int64_t stride) {
        each<R>([&](auto r) SLUICE_HERE {
            row[r] = a + r * stride;
            asm volatile("" : "+r"(row[r]));
        });
    }
    SLUICE_INLINE const Row* operator[](int r) const { return row[r]; }
};

// step(k, w) for every `size` inputs, two at a time: what a loop does beside its products counts too.
template <int R, int C, Asks asks, int size, class Step>
SLUICE_INLINE void each_step(const uint8_t* w, int64_t panel_bytes, int64_t inputs, Ahead& ahead, Step step) {
    for (int64_t k = 0; k < inputs; k += 2 * size, w += 2 * step_bytes) {
        prefetch<R, C, asks, 2>(w, panel_bytes, ahead);
        step(k, w);
        step(k + size, w + step_bytes);
    }
}

// Vector v of a step that begins at `at`, over C panels; `lane_bytes` a lane.
template <int lane_bytes>
SLUICE_INLINE const uint8_t* vector_at(const uint8_t* at, int64_t panel_bytes, int v) {
    return at + v / panel_vectors * panel_bytes + v % panel_vectors * width * lane_bytes;
}

constexpr auto add_product = [](F sum, F x, F weights) SLUICE_HERE { return Simd::add_product(sum, x, weights); };

struct AsItIs {
    template <class Tile>
    using Next = Tile;
    static constexpr int64_t asked = 128;  // bytes of a panel that such a tile asks for with 128 that it takes

    static uint8_t* kept() { return nullptr; }
};

struct OneBlock {
    using Room = AsItIs;
    static constexpr bool waits_for_memory = true;
    static constexpr int64_t block_inputs(int64_t inputs) { return inputs; }
    static constexpr int64_t part_inputs(int) { return 64; }
    static constexpr int64_t row_offset(int64_t k, int64_t) { return k; }
};

// Rows that are their inputs alone, sums that are floats.
struct FloatSums : OneBlock {
    static constexpr int64_t row_block(int64_t inputs) { return inputs; }
    static F total(const float* sums, const uint8_t*, int v) { return Simd::load(sums + v * width); }
};

struct FloatTile : FloatSums {
    using Row = float;
    static constexpr int max_rows = Simd::tile_rows;

    static constexpr int64_t panel_offset(int64_t k, int) { return k * panel_outputs * 4; }

    template <int R, int C, Asks asks>
    static void add(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, bool goes_on,
                    float* sums) {
        constexpr int V = panel_vectors * C;
        F sum[R][V];
        begin_tile(sum, goes_on, sums);
        const RowsAt<Row, R> row(a, stride);
        each_step<R, C, asks, 1>(w, panel_bytes, inputs, ahead, [&](int64_t k, const uint8_t* at) SLUICE_HERE {
            add_products(
                sum, [&](int r) SLUICE_HERE { return Simd::set1(row[r][k]); },
                [&](int v) SLUICE_HERE { return Simd::load((const float*)vector_at<4>(at, panel_bytes, v)); }, add_product);
        });
        store_tile(sum, sums);
    }
};

struct Bf16Tile : FloatSums {
    using Row = std::conditional_t<bf16_rows, uint16_t, float>;
    static constexpr int max_rows = Simd::tile_rows;

    static constexpr int64_t panel_offset(int64_t k, int) { return k * panel_outputs * 2; }

    template <int R, int C, Asks asks>
    static void add(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, bool goes_on,
                    float* sums) {
        constexpr int V = panel_vectors * C;
        F sum[R][V];
        begin_tile(sum, goes_on, sums);
        const RowsAt<Row, R> row(a, stride);
        each_step<R, C, asks, 2>(w, panel_bytes, inputs, ahead, [&](int64_t k, const uint8_t* at) SLUICE_HERE {
            const auto pairs = [&](int v) SLUICE_HERE { return Simd::load_lanes(vector_at<4>(at, panel_bytes, v)); };
            if constexpr (Simd::bf16_dot) {
                add_products(
                    sum, [&](int r) SLUICE_HERE { return Simd::set1_lane(row[r] + k); }, pairs,
                    [](F s, I x, I b) SLUICE_HERE { return Simd::add_bf16_products(s, b, x); });
            } else {
                add_products(
                    sum, [&](int r) SLUICE_HERE { return Simd::set1(row[r][k]); },
                    [&](int v) SLUICE_HERE { return Simd::low(pairs(v)); }, add_product);
                add_products(
                    sum, [&](int r) SLUICE_HERE { return Simd::set1(row[r][k + 1]); },
                    [&](int v) SLUICE_HERE { return Simd::high(pairs(v)); }, add_product);
            }
        });
        store_tile(sum, sums);
    }
};

// Weights and rows in fixed point (packing.h, rows.h): a block's products are summed in whole numbers, without rounding, blocks in floats.
// Weights have 16 bits, or 8 that are widened: those of a step of 4 inputs, a pair of inputs after the other.
template <int weight_bytes>
struct PairTile {
    using Row = int16_t;
    static constexpr int max_rows = Simd::tile_rows;
    static constexpr int pairs = 2 / weight_bytes;  // of a step

    static constexpr int64_t row_block(int64_t inputs) { return fixed_scale_words + inputs; }
    using Room = AsItIs;
    static constexpr bool waits_for_memory = true;
    static constexpr int64_t block_inputs(int64_t inputs) { return fixed_block(inputs); }
    static constexpr int64_t part_inputs(int) { return 1; }  // whole blocks
    static constexpr int64_t row_offset(int64_t k, int64_t inputs) { return k + k / fixed_block(inputs) * fixed_scale_words; }
    static constexpr int64_t panel_offset(int64_t k, int) { return k * panel_outputs * weight_bytes; }
    static F total(const float* sums, const uint8_t* after, int v) {
        return Simd::mul(Simd::load(sums + v * width), Simd::load((const float*)after + v * width));
    }

    template <int R, int C, Asks asks>
    static void add(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, bool goes_on,
                    float* sums) {
        constexpr int V = panel_vectors * C;
        I sum[R][V];
        clear_tile(sum);
        const RowsAt<Row, R> row(a + fixed_scale_words, stride);
        each_step<R, C, asks, 2 * pairs>(w, panel_bytes, inputs, ahead, [&](int64_t k, const uint8_t* at) SLUICE_HERE {
            each<pairs>([&](auto pair) SLUICE_HERE {
                add_products(
                    sum, [&](int r) SLUICE_HERE { return Simd::set1_lane(row[r] + k + 2 * pair); },
                    [&](int v) SLUICE_HERE {
                        const uint8_t* lanes = vector_at<2 * weight_bytes>(at + pair * 2 * panel_outputs, panel_bytes, v);
                        if constexpr (weight_bytes == 1) return Simd::widen_bytes(lanes);
                        else return Simd::load_lanes(lanes);
                    },
                    [](I s, I x, I b) SLUICE_HERE { return Simd::add_pair_products(s, x, b); });
            });
        });
        scale_blocks(sum, a, stride, goes_on, sums);
    }

    // Adds a block's sums, each times its row's scale.
    template <int R, int V>
    SLUICE_INLINE static void scale_blocks(const I (&sum)[R][V], const Row* a, int64_t stride, bool goes_on, float* sums) {
        each<R>([&](auto r) SLUICE_HERE {
            float row_scale;
            std::memcpy(&row_scale, a + r * stride, sizeof row_scale);
            const F scale = Simd::set1(row_scale);
            each<V>([&](auto v) SLUICE_HERE {
                float* all = sums + (r * V + v) * width;
                Simd::store(all, Simd::fma(Simd::to_float(sum[r][v]), scale, goes_on ? Simd::load(all) : Simd::zero()));
            });
        });
    }
};

using FixedTile = PairTile<2>;

// Inputs whose products with 4-bit weights Simd::add_small_products may sum: 32 * 255 * 8 / 2 fits 16 bits.
constexpr int nibbles_summed = 32;

// Adds the products of rows of unsigned bytes, `stride` apart, with bytes of weights.
template <int R, int C, Asks asks, int V, class Row>
SLUICE_INLINE void add_bytes(I (&sum)[R][V], const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, Ahead& ahead) {
    const RowsAt<Row, R> row(a, stride);
    each_step<R, C, asks, 4>(w, panel_bytes, inputs, ahead, [&](int64_t k, const uint8_t* at) SLUICE_HERE {
        add_products(
            sum, [&](int r) SLUICE_HERE { return Simd::set1_lane(row[r] + k); },
            [&](int v) SLUICE_HERE { return Simd::load_lanes(vector_at<4>(at, panel_bytes, v)); },
            [](I s, I x, I b) SLUICE_HERE { return Simd::add_byte_products(s, x, b); });
    });
}

// Rows are unsigned, 128 too high: what that adds is taken off at the end.
struct Int8Tile : OneBlock {
    using Row = uint8_t;
    static constexpr int max_rows = Simd::tile_rows;
    static constexpr bool waits_for_memory = screens_by_bytes;

    static constexpr int64_t row_block(int64_t inputs) { return inputs; }
    static constexpr int64_t panel_offset(int64_t k, int) { return k * panel_outputs; }
    static F total(const float* sums, const uint8_t* after, int v) {
        const float* scale = (const float*)after + v * width;
        const I exact = Simd::sub_lanes(Simd::load_lanes(sums + v * width), Simd::load_lanes(scale + panel_outputs));
        return Simd::mul(Simd::to_float(exact), Simd::load(scale));
    }

    template <int R, int C, Asks asks>
    static void add(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, bool goes_on,
                    float* sums) {
        constexpr int V = panel_vectors * C;
        I sum[R][V];
        begin_tile(sum, goes_on, sums);
        add_bytes<R, C, asks>(sum, a, stride, w, panel_bytes, inputs, ahead);
        store_tile(sum, sums);
    }
};

// Rows as in Int8Tile. Products of up to 32 inputs are summed in whatever small numbers the processor sums fastest, then scaled.
struct Int4Tile : FloatSums {
    using Row = uint8_t;
    static constexpr int max_rows = Simd::tile_rows * 2 / 3;  // the excess takes registers too
    static constexpr bool waits_for_memory = false;

    static constexpr int64_t part_inputs(int group) { return group; }
    static constexpr int64_t panel_offset(int64_t k, int group) { return k / group * group_bytes(group); }

    template <int R, int C, Asks asks>
    static void add(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int group, Ahead ahead, bool goes_on,
                    float* sums) {
        constexpr int V = panel_vectors * C;
        static const uint8_t excess_bytes[4] = {128, 128, 128, 128};
        const I excess_row = Simd::set1_lane(excess_bytes);
        // It asks at every step, not once for two.
        if (asks != Asks::alone) ahead.step = ahead.step * step_bytes / ((step_bytes + 127) / 128 * 128);
        const int together = group % nibbles_summed ? nibbles_summed / 2 : nibbles_summed;
        F total[R][V];
        begin_tile(total, goes_on, sums);
        const uint8_t* at = w;
        for (int64_t start = 0; start < inputs; start += group) {
            const uint8_t* scales = at + (int64_t)group / 2 * panel_outputs;
            for (int64_t k = start; k < start + group; k += together) {
                I sum[R][V], excess[1][V];
                clear_tile(sum);
                clear_tile(excess);
                for (int64_t i = k; i < k + together; i += 8, at += step_bytes) {
                    prefetch<R, C, asks, 1>(at, panel_bytes, ahead);
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
        store_tile(total, sums);
    }
};

}  // namespace SLUICE_ISA
