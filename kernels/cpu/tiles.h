// The inner products: R rows times C panels, every output summed in one accumulator in the order of the inputs.
//
// R, C and the row's place in a tile therefore cannot change a result. `a`: rows as prepare.h made them, `stride` elements apart;
// `w`: the first of C panels, `panel_bytes` apart; `out`: float [R][C * panel_outputs].
#pragma once

// Sums must stay in registers: a call would put them in memory.
#define SLUICE_INLINE __attribute__((always_inline)) inline

namespace SLUICE_ISA {

// How far ahead of the weights being multiplied the next ones are asked for, for tiles so short that memory is what they wait for.
constexpr int prefetch_bytes = 2048;

template <int R, int V>
SLUICE_INLINE void store_tile(const F (&sum)[R][V], float* out) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) Simd::store(out + (r * V + v) * width, sum[r][v]);
    }
}

template <int R, int V>
SLUICE_INLINE void clear_tile(F (&sum)[R][V]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) sum[r][v] = Simd::zero();
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
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            for (int b = 0; b < bytes; b += 64) __builtin_prefetch(at + c * panel_bytes + b + prefetch_bytes);
        }
    } else {
        for (int b = 0; b < bytes; b += 64) {
            __builtin_prefetch(ahead.at);
            ahead.at += ahead.step;
        }
    }
}

struct FloatTile {
    using Row = float;
    static constexpr int max_rows = Simd::tile_rows;

    template <int R, int C>
    static void run(const float* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, float* out) {
        constexpr int V = panel_vectors * C;
        F sum[R][V];
        clear_tile<R, V>(sum);
        for (int64_t k = 0; k < inputs; ++k) {
            prefetch<R, C>((const uint8_t*)((const float*)w + k * panel_outputs), panel_bytes, panel_outputs * 4, ahead);
            F weights[V];
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) {
                weights[v] = Simd::load((const float*)(w + v / panel_vectors * panel_bytes) + k * panel_outputs + v % panel_vectors * width);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                F x = Simd::set1(a[r * stride + k]);
#pragma GCC unroll 12
                for (int v = 0; v < V; ++v) sum[r][v] = Simd::fma(x, weights[v], sum[r][v]);
            }
        }
        store_tile<R, V>(sum, out);
    }
};

struct Bf16Tile {
    using Row = std::conditional_t<Simd::bf16_dot, uint16_t, float>;
    static constexpr int max_rows = Simd::tile_rows;

    template <int R, int C>
    static void run(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, float* out) {
        constexpr int V = panel_vectors * C;
        F sum[R][V];
        clear_tile<R, V>(sum);
        const uint8_t* at = w;
        for (int64_t k = 0; k < inputs; k += 2, at += panel_outputs * 4) {
            prefetch<R, C>(at, panel_bytes, panel_outputs * 4, ahead);
            multiply<R, V>(a + k, stride, at, panel_bytes, sum);
        }
        store_tile<R, V>(sum, out);
    }

private:
    template <int V>
    SLUICE_INLINE static void load(const uint8_t* at, int64_t panel_bytes, I (&pairs)[V]) {
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) pairs[v] = Simd::load_lanes(at + v / panel_vectors * panel_bytes + v % panel_vectors * width * 4);
    }

    template <int R, int V>
    SLUICE_INLINE static void multiply(const Row* a, int64_t stride, const uint8_t* at, int64_t panel_bytes, F (&sum)[R][V]) {
        I pairs[V];
        load<V>(at, panel_bytes, pairs);
        if constexpr (Simd::bf16_dot) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                I x = Simd::set1_lane(a + r * stride);
#pragma GCC unroll 12
                for (int v = 0; v < V; ++v) sum[r][v] = Simd::add_bf16_products(sum[r][v], pairs[v], x);
            }
        } else {
            F half[V];
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) half[v] = Simd::low(pairs[v]);
            add_half<R, V>(a, stride, half, sum);
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) half[v] = Simd::high(pairs[v]);
            add_half<R, V>(a + 1, stride, half, sum);
        }
    }

    template <int R, int V>
    SLUICE_INLINE static void add_half(const float* a, int64_t stride, const F (&half)[V], F (&sum)[R][V]) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            F x = Simd::set1(a[r * stride]);
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) sum[r][v] = Simd::fma(x, half[v], sum[r][v]);
        }
    }
};

struct Int8Tile {
    using Row = std::conditional_t<Simd::byte_dot, uint8_t, int16_t>;
    static constexpr int max_rows = Simd::tile_rows;
    static constexpr int step = Simd::byte_dot ? 4 : 2;

    template <int R, int C>
    static void run(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, float* out) {
        constexpr int V = panel_vectors * C;
        I sum[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) sum[r][v] = Simd::zero_lanes();
        }
        const uint8_t* at = w;
        for (int64_t k = 0; k < inputs; k += step, at += panel_outputs * step) {
            prefetch<R, C>(at, panel_bytes, panel_outputs * step, ahead);
            I weights[V];
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) weights[v] = load(at + v / panel_vectors * panel_bytes + v % panel_vectors * width * step);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                I x = Simd::set1_lane(a + r * stride + k);
#pragma GCC unroll 12
                for (int v = 0; v < V; ++v) sum[r][v] = add(sum[r][v], x, weights[v]);
            }
        }
        finish<R, V>(sum, w + inputs * panel_outputs, panel_bytes, out);
    }

private:
    static I load(const uint8_t* p) {
        if constexpr (Simd::byte_dot) return Simd::load_lanes(p);
        else return Simd::load_bytes_as_pairs((const int8_t*)p);
    }
    static I add(I sum, I x, I weights) {
        if constexpr (Simd::byte_dot) return Simd::add_byte_products(sum, x, weights);
        else return Simd::add_pair_products(sum, x, weights);
    }

    // Unrolled like every loop over sums: an index would put all of them in memory. Times the outputs' scales; byte dots took the rows' numbers plus 128. The rows' scales follow in the epilogue.
    template <int R, int V>
    SLUICE_INLINE static void finish(const I (&sum)[R][V], const uint8_t* scales, int64_t panel_bytes, float* out) {
#pragma GCC unroll 12
        for (int v = 0; v < V; ++v) {
            const float* scale = (const float*)(scales + v / panel_vectors * panel_bytes) + v % panel_vectors * width;
            F factor = Simd::load(scale);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                I products = sum[r][v];
                if constexpr (Simd::byte_dot) products = Simd::sub_lanes(products, Simd::load_lanes(scale + panel_outputs));
                Simd::store(out + (r * V + v) * width, Simd::mul(Simd::to_float(products), factor));
            }
        }
    }
};

struct Int4Tile {
    using Row = int16_t;
    static constexpr int max_rows = Simd::tile_rows / 2;

    template <int R, int C>
    static void run(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int group, Ahead ahead, float* out) {
        constexpr int V = panel_vectors * C;
        F total[R][V];
        clear_tile<R, V>(total);
        const uint8_t* at = w;
        for (int64_t start = 0; start < inputs; start += group) {
            I sum[R][V];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
#pragma GCC unroll 12
                for (int v = 0; v < V; ++v) sum[r][v] = Simd::zero_lanes();
            }
            for (int k = 0; k < group; k += 2, at += panel_outputs) {
                prefetch<R, C>(at, panel_bytes, panel_outputs, ahead);
                I weights[V];
#pragma GCC unroll 12
                for (int v = 0; v < V; ++v) weights[v] = Simd::load_nibbles_as_pairs(at + v / panel_vectors * panel_bytes + v % panel_vectors * width);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    I x = Simd::set1_lane(a + r * stride + start + k);
#pragma GCC unroll 12
                    for (int v = 0; v < V; ++v) sum[r][v] = Simd::add_pair_products(sum[r][v], x, weights[v]);
                }
            }
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) {
                F scale = Simd::load_half((const uint16_t*)(at + v / panel_vectors * panel_bytes) + v % panel_vectors * width);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) total[r][v] = Simd::fma(Simd::to_float(sum[r][v]), scale, total[r][v]);
            }
            at += 2 * panel_outputs;
        }
        store_tile<R, V>(total, out);
    }
};

}  // namespace SLUICE_ISA
