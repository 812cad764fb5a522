// The tile registers of AMX: eight, each of up to 16 rows of up to 64 bytes, and products of two of them that are added to a third.
//
// No compiler's intrinsics: those want a register's number as a literal, which no template can give. The compiler uses none of these
// registers itself, so that what one call leaves in them is there in the next.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace sluice {

// Asks Linux for the registers, which a process has only when it asks.
inline bool amx_granted() {
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

namespace amx {

constexpr int tile_rows = 16, row_bytes = 64;

// What LDTILECFG reads.
struct alignas(64) Shapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
};
static_assert(sizeof(Shapes) == 64);

inline void configure(const Shapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void release() { asm volatile("tilerelease"); }

template <int t>
inline void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
}

// Rows `stride` bytes apart.
template <int t>
inline void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
}

template <int t>
inline void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
}

// sum[m][n] += a[m][k] * b[k][n] over bf16, b in pairs along k: [k / 2][n][2]. Sums of even k and of odd k are rounded apart, from 0, with
// subnormal numbers as 0; then their sum is added to `sum`.
template <int sum, int a, int b>
inline void add_bf16_products() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

// The same over bytes, unsigned in a and signed in b, b in fours along k; sums are int32.
template <int sum, int a, int b>
inline void add_byte_products() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

}  // namespace amx
}  // namespace sluice
