// Stands in for kernels/cpu/amx.h on a processor without tile registers: the same functions, number by number from the instructions'
// descriptions. What the processor refuses ends the program: registers that are not shaped, or not for each other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace sluice {

inline bool amx_granted() { return true; }

namespace amx {

constexpr int tile_rows = 16, row_bytes = 64;

struct alignas(64) Shapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

struct Registers {
    Shapes shapes;
    bool shaped = false;
    uint8_t tile[8][tile_rows][row_bytes];
};

inline Registers& registers() {
    static thread_local Registers mine;
    return mine;
}

inline void demand(bool allowed) {
    if (!allowed) std::abort();
}

inline void configure(const Shapes& shapes) {
    for (int t = 0; t < 8; ++t) demand(shapes.rows[t] <= tile_rows && shapes.bytes[t] <= row_bytes && !shapes.rows[t] == !shapes.bytes[t]);
    registers().shapes = shapes;
    registers().shaped = true;
    std::memset(registers().tile, 0, sizeof registers().tile);
}

inline void release() { registers().shaped = false; }

inline int rows_of(int t) {
    demand(registers().shaped && registers().shapes.rows[t]);
    return registers().shapes.rows[t];
}

inline int bytes_of(int t) { return registers().shapes.bytes[t]; }

template <int t>
inline void zero() {
    rows_of(t);
    std::memset(registers().tile[t], 0, sizeof registers().tile[t]);
}

template <int t>
inline void load(const void* from, int64_t stride) {
    zero<t>();
    for (int r = 0; r < rows_of(t); ++r) std::memcpy(registers().tile[t][r], (const char*)from + r * stride, bytes_of(t));
}

template <int t>
inline void store(void* to, int64_t stride) {
    for (int r = 0; r < rows_of(t); ++r) std::memcpy((char*)to + r * stride, registers().tile[t][r], bytes_of(t));
}

inline float without_subnormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return without_subnormals(y);
}

// term(sum, m, k, n) of all m, n and fours of bytes k.
template <int sum, int a, int b, class Number, class Term>
inline void add_products(Term term) {
    demand(rows_of(sum) == rows_of(a) && bytes_of(sum) == bytes_of(b) && bytes_of(a) == 4 * rows_of(b));
    Registers& all = registers();
    for (int m = 0; m < rows_of(sum); ++m) {
        for (int n = 0; n < bytes_of(sum) / 4; ++n) {
            Number so_far;
            std::memcpy(&so_far, all.tile[sum][m] + 4 * n, 4);
            so_far = term(so_far, all.tile[a][m], n);
            std::memcpy(all.tile[sum][m] + 4 * n, &so_far, 4);
        }
    }
}

template <int sum, int a, int b>
inline void add_bf16_products() {
    add_products<sum, a, b, float>([](float so_far, const uint8_t* row, int n) {
        float part[2] = {0.0f, 0.0f};
        for (int k = 0; k < rows_of(b); ++k) {
            for (int i = 0; i < 2; ++i) {
                uint16_t x, w;
                std::memcpy(&x, row + 4 * k + 2 * i, 2);
                std::memcpy(&w, registers().tile[b][k] + 4 * n + 2 * i, 2);
                part[i] = without_subnormals(std::fma(from_bf16(x), from_bf16(w), part[i]));
            }
        }
        return without_subnormals(without_subnormals(so_far) + without_subnormals(part[0] + part[1]));
    });
}

template <int sum, int a, int b>
inline void add_byte_products() {
    add_products<sum, a, b, int32_t>([](int32_t so_far, const uint8_t* row, int n) {
        for (int k = 0; k < 4 * rows_of(b); ++k) {
            so_far += (int32_t)row[k] * (int8_t)registers().tile[b][k / 4][4 * n + k % 4];
        }
        return so_far;
    });
}

}  // namespace amx
}  // namespace sluice
