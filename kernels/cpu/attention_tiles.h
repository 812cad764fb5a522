// The two products of attention, queries by keys and weights by values, on tiles of rows that share what they load of the cache.
//
// The cache is read in lines of 16 lanes (64 bytes): 16 tokens of keys, 16 dimensions of values. bf16 lanes hold pairs along the summed
// dimension. Every sum has one accumulator and takes its terms in order, so that no result depends on the height or width of a tile.
#pragma once

namespace SLUICE_ISA {

constexpr int line_lanes = 16;
constexpr int line_vectors = line_lanes / width;
constexpr int highest_tile = 6;

struct PlainCache {
    using Stored = float;
    using Factor = float;  // queries and weights
    static constexpr int pair = 1;
    static constexpr Type type = Type::f32;
};

struct PairedCache {
    using Stored = uint16_t;
    using Factor = std::conditional_t<bf16_rows, uint16_t, float>;
    static constexpr int pair = 2;
    static constexpr Type type = Type::bf16;
};

// Lines side by side in a tile of R rows: enough sums under way to hide an instruction's latency, no more than the registers hold.
constexpr int widest_tile(int rows) { return width == 16 ? 4 : rows <= 3 ? 2 : 1; }

template <int R, int V>
struct Sums {
    F sum[R][V];

    void zero() {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) sum[r][v] = Simd::zero();
    }
    void load(const float* from, int64_t stride) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) sum[r][v] = Simd::load(from + r * stride + v * width);
    }
    void store(float* to, int64_t stride) const {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) Simd::store(to + r * stride + v * width, sum[r][v]);
    }

    // sum[r][v] += scalar(r) * vector(v), the fewer of the two held in registers.
    template <class Scalar, class Vector>
    [[gnu::always_inline]] void add(Scalar scalar, Vector vector) {
        if constexpr (V <= R) {
            F b[V];
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) b[v] = vector(v);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                F a = scalar(r);
#pragma GCC unroll 12
                for (int v = 0; v < V; ++v) sum[r][v] = Simd::fma(a, b[v], sum[r][v]);
            }
        } else {
            F a[R];
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) a[r] = scalar(r);
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) {
                F b = vector(v);
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) sum[r][v] = Simd::fma(a[r], b, sum[r][v]);
            }
        }
    }

    // One step along the summed dimension. a: the rows' factors, `stride` apart; b(v): where vector v lies.
    template <class Cache, class Place>
    [[gnu::always_inline]] void step(const typename Cache::Factor* a, int64_t stride, Place b) {
        if constexpr (Cache::pair == 1) {
            add([&](int r) { return Simd::set1(a[r * stride]); }, [&](int v) { return Simd::load(b(v)); });
        } else if constexpr (Simd::bf16_dot) {
            I lanes[V];
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) lanes[v] = Simd::load_lanes(b(v));
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                I factor = Simd::set1_lane(a + r * stride);
#pragma GCC unroll 12
                for (int v = 0; v < V; ++v) sum[r][v] = Simd::add_bf16_products(sum[r][v], factor, lanes[v]);
            }
        } else {
            add([&](int r) { return Simd::set1(a[r * stride]); }, [&](int v) { return Simd::low(Simd::load_lanes(b(v))); });
            add([&](int r) { return Simd::set1(a[r * stride + 1]); }, [&](int v) { return Simd::high(Simd::load_lanes(b(v))); });
        }
    }
};

// scores[r][token] = q[r] . k[token] for L lines of tokens. k[l]: line l's first step, `k_stride` numbers from one to the next;
// ahead[l]: memory to ask for meanwhile, a line a step.
template <class Cache, int R, int L>
inline void score_tile(const typename Cache::Factor* q, int64_t q_stride, const typename Cache::Stored* const* k, int64_t k_stride,
                       int64_t dim, const char* const* ahead, float* scores, int64_t scores_stride) {
    Sums<R, L * line_vectors> sums;
    sums.zero();
    const typename Cache::Stored* from[L];
    const char* next[L];
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
        from[l] = k[l];
        next[l] = ahead[l];
    }
    for (int64_t d = 0; d < dim; d += Cache::pair) {
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l) {
            if constexpr (!Simd::reads_ahead) __builtin_prefetch(next[l]);
            next[l] += 64;
        }
        sums.template step<Cache>(q + d, q_stride,
                                  [&](int v) { return from[v / line_vectors] + v % line_vectors * width * Cache::pair; });
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l) from[l] += k_stride;
    }
    sums.store(scores, scores_stride);
}

// Tokens [first, last) of one stretch of values; `ahead`: bytes from a value to what is to be asked for meanwhile.
template <class Stored>
struct Stretch {
    const Stored* values;  // of token `first`, at the tile's first dimension
    int64_t first;
    int64_t last;
    int64_t ahead;
};

// out[r][d] += weights[r][token] * v[token][d], token after token over the stretches, for L lines of dimensions.
template <class Cache, int R, int L>
inline void value_tile(const typename Cache::Factor* weights, int64_t weights_stride, const Stretch<typename Cache::Stored>* stretches,
                       int count, int64_t offset, int64_t dim, bool from_zero, float* out, int64_t out_stride) {
    Sums<R, L * line_vectors> sums;
    if (from_zero) sums.zero();
    else sums.load(out, out_stride);
    for (int i = 0; i < count; ++i) {
        const typename Cache::Stored* v = stretches[i].values + offset;
        const int64_t ahead = stretches[i].ahead;
        for (int64_t token = stretches[i].first; token < stretches[i].last; token += Cache::pair) {
#pragma GCC unroll 4
            for (int l = 0; l < L; ++l) {
                if constexpr (!Simd::reads_ahead) __builtin_prefetch((const char*)v + ahead + 64 * l);
            }
            sums.template step<Cache>(weights + token, weights_stride, [&](int u) { return v + u * width * Cache::pair; });
            v += dim * Cache::pair;
        }
    }
    sums.store(out, out_stride);
}

}  // namespace SLUICE_ISA
