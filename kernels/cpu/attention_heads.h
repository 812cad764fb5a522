// Rotary positions (Su et al. 2021, NeoX halves) and the cache's layout: what attention reads of q and writes of k and v.
//
// A block of the cache holds all key heads, then all value heads. Within a block and head: keys [dim / pair][block_size][pair], values
// [block_size / pair][dim][pair]; pair is 1 in float32, 2 in bf16 and in bytes. Behind a head's keys in bytes stand the scales of its keys,
// then of its values, as bf16 [block_size].
#pragma once

namespace SLUICE_ISA {

using sluice::Attention;
using sluice::max_head_dim;

// One head of one token as floats [0, dim), rotated to its position; rounded nowhere.
inline void rotate(const void* x, int64_t start, Type type, const float* cos_sin, int64_t dim, float* out) {
    const int64_t half = dim / 2;
    auto turn = [&](int64_t i, int n) {
        F first = load_typed(x, start + i, n, type), second = load_typed(x, start + half + i, n, type);
        F cos = load_typed(cos_sin, i, n, Type::f32), sin = load_typed(cos_sin, half + i, n, Type::f32);
        store_typed(out, i, Simd::fma(first, cos, Simd::sub(Simd::zero(), Simd::mul(second, sin))), n, Type::f32);
        store_typed(out, half + i, Simd::fma(second, cos, Simd::mul(first, sin)), n, Type::f32);
    };
    int64_t i = 0;
    for (; i + width <= half; i += width) turn(i, width);
    if (i < half) turn(i, (int)(half - i));
}

// The same in what the cache, or a product, takes it as; `room`: floats [0, dim) to work in.
inline void rotate(const void* x, int64_t start, Type type, const float* cos_sin, int64_t dim, float*, float* out) {
    rotate(x, start, type, cos_sin, dim, out);
}

inline void rotate(const void* x, int64_t start, Type type, const float* cos_sin, int64_t dim, float* room, uint16_t* out) {
    rotate(x, start, type, cos_sin, dim, room);
    for (int64_t i = 0; i < dim; i += width) Simd::store_bf16(out + i, Simd::load(room + i));
}

// Numbers from a head's keys to those of the next head.
template <class Cache>
constexpr int64_t key_stride(int64_t dim, int64_t block_size) {
    return (dim + (Cache::scaled ? 2 * Cache::pair : 0)) * block_size;
}

// What a whole number of at most `most` stands for, that of the greatest magnitude among x [0, count): 0 where all are, no number where one
// is infinite or none.
inline float scale_of(const float* x, int64_t count, float most) {
    F found = Simd::zero(), wrong = Simd::zero();
    for (int64_t i = 0; i < count; i += width) {
        const F lanes = Simd::load(x + i);
        found = Simd::max(magnitude(lanes), found);
        wrong = Simd::fma(lanes, Simd::zero(), wrong);
    }
    const float largest = Simd::largest(found);
    return (largest > fixed_smallest ? largest / most : 0.0f) + Simd::sum(wrong);
}

// x [0, count) as whole numbers times scale.
inline void store_whole(const float* x, int64_t count, float scale, int16_t* out) {
    const F inverse = Simd::set1(scale > 0.0f ? 1.0f / scale : 0.0f);
    for (int64_t i = 0; i < count; i += width) Simd::store_words(out + i, Simd::mul(Simd::load(x + i), inverse));
}

// The same in bytes; gives the scale as bf16, whose rounding takes no number past the greatest byte.
inline uint16_t store_whole(const float* x, int64_t count, int8_t* out) {
    alignas(64) int16_t words[max_head_dim];
    const uint16_t scale = float_to_bf16(scale_of(x, count, byte_most));
    store_whole(x, count, bf16_to_float(scale), words);
    for (int64_t i = 0; i < count; ++i) out[i] = (int8_t)words[i];
    return scale;
}

// Keys (rotated) and values of heads [head_first, head_last) of one token into their slot.
template <class Cache>
inline void write_token(const Attention& call, int64_t token, int64_t head_first, int64_t head_last) {
    using Stored = typename Cache::Stored;
    constexpr int pair = Cache::pair;
    const int64_t slot = call.slots[token], dim = call.dim, block_size = call.block_size;
    if (slot < 0) return;
    const int64_t place = slot / block_size * call.block_stride, offset = slot % block_size;
    const float* cos_sin = call.cos_sin + call.positions[token] * dim;
    alignas(64) float rotated[max_head_dim];
    alignas(64) Stored row[max_head_dim];
    for (int64_t head = head_first; head < head_last; ++head) {
        const int64_t k_start = token * call.k_stride + head * dim, v_start = token * call.v_stride + head * dim;
        Stored* key = (Stored*)call.k_cache + place + head * key_stride<Cache>(dim, block_size) + offset * pair;
        Stored* value = (Stored*)call.v_cache + place + head * dim * block_size + offset / pair * pair * dim + offset % pair;
        const auto read_values = [&](void* to, Type type) {
            for (int64_t d = 0; d < dim; d += width) store_typed(to, d, load_typed(call.v, v_start + d, width, call.rows), width, type);
        };
        if constexpr (Cache::scaled) {
            rotate(call.k, k_start, call.rows, cos_sin, dim, rotated);
            const uint16_t scale = store_whole(rotated, dim, row);
            std::memcpy(key + dim * block_size, &scale, sizeof scale);
        } else {
            rotate(call.k, k_start, call.rows, cos_sin, dim, rotated, row);
        }
        for (int64_t d = 0; d < dim; d += pair) std::memcpy(key + d * block_size, row + d, sizeof(Stored) * pair);
        if constexpr (Cache::scaled) {
            read_values(rotated, Type::f32);
            const uint16_t scale = store_whole(rotated, dim, row);
            std::memcpy(key + (dim + pair) * block_size, &scale, sizeof scale);
        } else {
            read_values(row, Cache::type);
        }
        for (int64_t d = 0; d < dim; ++d) value[d * pair] = row[d];
    }
}

// Asks for numbers [start, start + count) of q, k or v: rows of them lie too far apart for the processor to foresee the next.
inline void expect_numbers(const void* x, int64_t start, int64_t count, Type type) {
    const int64_t wide = type == Type::f32 ? 4 : 2;
    for (int64_t byte = 0; byte < count * wide; byte += 64) __builtin_prefetch((const char*)x + start * wide + byte);
}

// Asks for what write_token will read, and for the lines that it will write of a token alone in its block.
template <class Cache>
inline void expect_token(const Attention& call, int64_t token, int64_t head_first, int64_t head_last) {
    using Stored = typename Cache::Stored;
    const int64_t slot = call.slots[token], row = call.block_size * Cache::pair;
    if (slot < 0) return;
    const int64_t first = head_first * call.dim, count = (head_last - head_first) * call.dim;
    expect_numbers(call.k, token * call.k_stride + first, count, call.rows);
    expect_numbers(call.v, token * call.v_stride + first, count, call.rows);
    const int64_t place = slot / call.block_size * call.block_stride + slot % call.block_size * Cache::pair;
    for (int64_t head = head_first; head < head_last; ++head) {
        const Stored* key = (const Stored*)call.k_cache + place + head * key_stride<Cache>(call.dim, call.block_size);
        for (int64_t i = 0; i < call.dim / Cache::pair; ++i) __builtin_prefetch(key + i * row, 1);
    }
}

}  // namespace SLUICE_ISA
