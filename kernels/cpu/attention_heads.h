// Rotary positions (Su et al. 2021, NeoX halves) and the cache's layout: what attention reads of q and writes of k and v.
//
// A block of the cache holds all key heads, then, at the same stride, all value heads. Within a block and head: keys
// [dim / pair][block_size][pair], values [block_size / pair][dim][pair]; pair is 2 in bf16, 1 in float32.
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
        const int64_t start = place + head * dim * block_size;
        rotate(call.k, token * call.k_stride + head * dim, call.rows, cos_sin, dim, rotated, row);
        Stored* key = (Stored*)call.k_cache + start + offset * pair;
        for (int64_t d = 0; d < dim; d += pair) std::memcpy(key + d * block_size, row + d, sizeof(Stored) * pair);
        Stored* to = (Stored*)call.v_cache + start + offset / pair * pair * dim + offset % pair;
        for (int64_t d = 0; d < dim; d += width) {
            store_typed(row, d, load_typed(call.v, token * call.v_stride + head * dim + d, width, call.rows), width, Cache::type);
        }
        for (int64_t d = 0; d < dim; ++d) to[d * pair] = row[d];
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
    const Stored* key = (const Stored*)call.k_cache + place + first * call.block_size;
    for (int64_t i = 0; i < count / Cache::pair; ++i) __builtin_prefetch(key + i * row, 1);
}

}  // namespace SLUICE_ISA
