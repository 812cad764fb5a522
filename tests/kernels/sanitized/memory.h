// Arrays that end where the operators' promises end, and chance.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>

#include "operators.h"

using sluice::Type;

class Chance {
public:
    explicit Chance(uint64_t seed) : bits_(seed) {}
    int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(bits_); }
    bool one_in(int64_t n) { return between(1, n) == 1; }
    float number() { return std::normal_distribution<float>()(bits_); }

private:
    std::mt19937_64 bits_;
};

// `bytes` of memory with nothing usable behind them; of 0 bytes, nothing at all.
class Exact {
public:
    explicit Exact(int64_t bytes) : size_(bytes) {
        if (posix_memalign(&data_, 64, (size_t)bytes)) std::abort();
        std::memset(data_, 0xff, (size_t)bytes);  // NaN in float32 and bfloat16, -1 in integers
    }
    Exact(Exact&& other) : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
    ~Exact() { std::free(data_); }

    void* data() { return data_; }
    template <class Number>
    Number* of() {
        return (Number*)data_;
    }
    int64_t size() const { return size_; }

private:
    void* data_ = nullptr;
    int64_t size_;
};

inline int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }  // int8, of caches alone, is drawn as bf16

inline void put(Exact& to, int64_t i, float x, Type type) {
    if (type == Type::f32) {
        to.of<float>()[i] = x;
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to.of<uint16_t>()[i] = (uint16_t)(bits >> 16);
}

inline float get(Exact& from, int64_t i, Type type) {
    if (type == Type::f32) return from.of<float>()[i];
    uint32_t bits = (uint32_t)from.of<uint16_t>()[i] << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// `count` numbers of `type`, drawn.
class Numbers : public Exact {
public:
    Numbers(Chance& chance, int64_t count, Type type) : Exact(count * bytes_of(type)) {
        for (int64_t i = 0; i < count; ++i) put(*this, i, chance.number(), type);
    }
};

// Ends the program when an output was left as it was, or is no number.
inline void expect_written(Exact& out, int64_t count, Type type, const char* what) {
    for (int64_t i = 0; i < count; ++i) {
        if (!std::isfinite(get(out, i, type))) {
            std::fprintf(stderr, "%s: output %lld of %lld is no finite number\n", what, (long long)i, (long long)count);
            std::exit(3);
        }
    }
}
