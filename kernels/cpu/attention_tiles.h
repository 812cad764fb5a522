// The two products of attention, queries by keys and weights by values, on tiles of rows that share what they load of the cache.
//
// The cache is read in lines of 16 lanes: 16 tokens of keys, 16 dimensions of values. Lanes of bf16 and of bytes hold pairs along the
// summed dimension. Every sum has one accumulator and takes its terms in order, so that no result depends on the height or width of a tile.
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
    static constexpr bool scaled = false;
};

struct PairedCache {
    using Stored = uint16_t;
    using Factor = std::conditional_t<bf16_rows, uint16_t, float>;
    static constexpr int pair = 2;
    static constexpr Type type = Type::bf16;
    static constexpr bool scaled = false;
};

// Whole numbers of at most byte_most times a scale, which each head of each token has for its key and for its value. Queries and weights are
// whole numbers of at most word_most times a scale a row, so that sums are exact in 32 bits.
struct ByteCache {
    using Stored = int8_t;
    using Factor = int16_t;
    static constexpr int pair = 2;
    static constexpr Type type = Type::int8;
    static constexpr bool scaled = true;
};
constexpr float byte_most = 127.0f, word_most = 32767.0f;
static_assert((int64_t)byte_most * (int64_t)word_most * std::max(sluice::attention_chunk, sluice::max_head_dim) < INT32_MAX);

template <class Cache>
constexpr int line_bytes = line_lanes * Cache::pair * (int)sizeof(typename Cache::Stored);

// Stretches of bytes are too short for the processor to foresee: on Zen 4 attention of 32 x 512 takes 0.84 with asking.
template <class Cache>
constexpr bool asks_ahead = !Simd::reads_ahead || Cache::scaled;

// Lines side by side in a tile of R rows: enough sums under way to hide an instruction's latency, no more than the registers hold.
constexpr int widest_tile(int rows) { return width == 16 ? 4 : rows <= 3 ? 2 : 1; }

template <bool whole>
struct SumOf {
    using Lanes = F;
};
template <>
struct SumOf<true> {
    using Lanes = I;
};

template <class Cache, int R, int V>
struct Sums {
    typename SumOf<Cache::scaled>::Lanes sum[R][V];

    void zero() {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) {
                if constexpr (Cache::scaled) sum[r][v] = Simd::zero_lanes();
                else sum[r][v] = Simd::zero();
            }
    }
    void load(const float* from, int64_t stride) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) {
                if constexpr (Cache::scaled) sum[r][v] = Simd::load_lanes(from + r * stride + v * width);
                else sum[r][v] = Simd::load(from + r * stride + v * width);
            }
    }
    void store(float* to, int64_t stride) const {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) {
                if constexpr (Cache::scaled) Simd::store_lanes(to + r * stride + v * width, sum[r][v]);
                else Simd::store(to + r * stride + v * width, sum[r][v]);
            }
    }
    // Whole numbers as what they stand for: times scale(r, v).
    template <class Scale>
    [[gnu::always_inline]] void store_scaled(float* to, int64_t stride, Scale scale) const {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) Simd::store(to + r * stride + v * width, Simd::mul(Simd::to_float(sum[r][v]), scale(r, v)));
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
    template <class Place>
    [[gnu::always_inline]] void step(const typename Cache::Factor* a, int64_t stride, Place b) {
        if constexpr (Cache::pair == 1) {
            add([&](int r) { return Simd::set1(a[r * stride]); }, [&](int v) { return Simd::load(b(v)); });
        } else if constexpr (Cache::scaled || Simd::bf16_dot) {
            I lanes[V];
#pragma GCC unroll 12
            for (int v = 0; v < V; ++v) {
                if constexpr (Cache::scaled) lanes[v] = Simd::widen_bytes(b(v));
                else lanes[v] = Simd::load_lanes(b(v));
            }
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                I factor = Simd::set1_lane(a + r * stride);
#pragma GCC unroll 12
                for (int v = 0; v < V; ++v) {
                    if constexpr (Cache::scaled) sum[r][v] = Simd::add_pair_products(sum[r][v], factor, lanes[v]);
                    else sum[r][v] = Simd::add_bf16_products(sum[r][v], factor, lanes[v]);
                }
            }
        } else {
            add([&](int r) { return Simd::set1(a[r * stride]); }, [&](int v) { return Simd::low(Simd::load_lanes(b(v))); });
            add([&](int r) { return Simd::set1(a[r * stride + 1]); }, [&](int v) { return Simd::high(Simd::load_lanes(b(v))); });
        }
    }
};

// scores[r][token] = q[r] . k[token] for L lines of tokens. k[l]: line l's first step, `k_stride` numbers from one to the next, and behind
// the last where the cache has them the keys' scales; q_scales: the rows', there; ahead[l]: memory to ask for meanwhile, a line a step.
template <class Cache, int R, int L>
inline void score_tile(const typename Cache::Factor* q, int64_t q_stride, const float* q_scales, const typename Cache::Stored* const* k,
                       int64_t k_stride, int64_t dim, const char* const* ahead, float* scores, int64_t scores_stride) {
    Sums<Cache, R, L * line_vectors> sums;
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
            if constexpr (asks_ahead<Cache>) __builtin_prefetch(next[l]);
            next[l] += line_bytes<Cache>;
        }
        sums.step(q + d, q_stride, [&](int v) { return from[v / line_vectors] + v % line_vectors * width * Cache::pair; });
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l) from[l] += k_stride;
    }
    if constexpr (Cache::scaled) {
        F k_scales[L * line_vectors];
#pragma GCC unroll 12
        for (int v = 0; v < L * line_vectors; ++v) {
            k_scales[v] = Simd::load_bf16((const uint16_t*)from[v / line_vectors] + v % line_vectors * width);
        }
        sums.store_scaled(scores, scores_stride, [&](int r, int v) { return Simd::mul(Simd::set1(q_scales[r]), k_scales[v]); });
    } else {
        sums.store(scores, scores_stride);
    }
}

// Tokens [first, last) of one stretch of values; `ahead`: bytes from a value to what is to be asked for meanwhile.
template <class Stored>
struct Stretch {
    const Stored* values;  // of token `first`, at the tile's first dimension
    int64_t first;
    int64_t last;
    int64_t ahead;
};

// out[r][d] += weights[r][token] * v[token][d], token after token over the stretches, for L lines of dimensions. Of a cache with scales
// out is whole numbers until the rows' `scales` are there (null: not yet).
template <class Cache, int R, int L>
inline void value_tile(const typename Cache::Factor* weights, int64_t weights_stride, const Stretch<typename Cache::Stored>* stretches,
                       int count, int64_t offset, int64_t dim, bool from_zero, const float* scales, float* out, int64_t out_stride) {
    Sums<Cache, R, L * line_vectors> sums;
    if (from_zero) sums.zero();
    else sums.load(out, out_stride);
    for (int i = 0; i < count; ++i) {
        const typename Cache::Stored* v = stretches[i].values + offset;
        const int64_t ahead = stretches[i].ahead;
        for (int64_t token = stretches[i].first; token < stretches[i].last; token += Cache::pair) {
#pragma GCC unroll 4
            for (int l = 0; l < L; ++l) {
                if constexpr (asks_ahead<Cache>) __builtin_prefetch((const char*)v + ahead + line_bytes<Cache> * l);
            }
            sums.step(weights + token, weights_stride, [&](int u) { return v + u * width * Cache::pair; });
            v += dim * Cache::pair;
        }
    }
    if constexpr (Cache::scaled) {
        if (scales) return sums.store_scaled(out, out_stride, [&](int r, int) { return Simd::set1(scales[r]); });
    }
    sums.store(out, out_stride);
}

}  // namespace SLUICE_ISA
