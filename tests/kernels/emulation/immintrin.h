// Stands before the compiler's <immintrin.h>: AVX-512 as SIMDe computes it on a processor that has none, for the tests alone.
// What SIMDe 0.7.4 lacks or has wrong follows, lane by lane from the instructions' descriptions.
#pragma once
#include_next <immintrin.h>

#define SLUICE_EMULATED

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <math.h>
#include <simde/x86/avx512.h>
#include <string.h>

namespace emulated {

template <class To, class From>
inline To same_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

struct Floats {
    float lane[16];
};
struct Ints {
    int lane[16];
};
struct Halves {
    unsigned short lane[16];
};

inline simde__m512i cvtepu16_epi32(__m256i x) {
    Halves in = same_bits<Halves>(x);
    Ints out;
    for (int i = 0; i < 16; ++i) out.lane[i] = in.lane[i];
    return same_bits<simde__m512i>(out);
}
inline __m256i cvtepi32_epi16(simde__m512i x) {
    Ints in = same_bits<Ints>(x);
    Halves out;
    for (int i = 0; i < 16; ++i) out.lane[i] = (unsigned short)in.lane[i];
    return same_bits<__m256i>(out);
}
inline simde__m512 cvtepi32_ps(simde__m512i x) {
    Ints in = same_bits<Ints>(x);
    Floats out;
    for (int i = 0; i < 16; ++i) out.lane[i] = (float)in.lane[i];
    return same_bits<simde__m512>(out);
}
inline simde__m512i cvtps_epi32(simde__m512 x) {
    Floats in = same_bits<Floats>(x);
    Ints out;
    for (int i = 0; i < 16; ++i) out.lane[i] = (int)nearbyintf(in.lane[i]);
    return same_bits<simde__m512i>(out);
}
inline simde__m512 cvtph_ps(__m256i x) {
    struct {
        __m256 half[2];
    } out = {{_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))}};
    return same_bits<simde__m512>(out);
}
inline __m256i cvtneps_pbh(simde__m512 x) {
    Ints in = same_bits<Ints>(x);
    Halves out;
    for (int i = 0; i < 16; ++i) {
        const unsigned bits = (unsigned)in.lane[i], magnitude = bits & 0x7fffffffu;
        if (magnitude > 0x7f800000u) out.lane[i] = (unsigned short)(bits >> 16 | 0x40);
        else if (magnitude < 0x00800000u) out.lane[i] = (unsigned short)(bits >> 31 << 15);
        else out.lane[i] = (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    return same_bits<__m256i>(out);
}
// Of numbers below 2^-126 the instruction takes none.
inline simde__m512i normal_halves(simde__m512i x) {
    struct Both {
        unsigned short lane[32];
    } out = same_bits<Both>(x);
    for (int i = 0; i < 32; ++i) {
        if ((out.lane[i] & 0x7f80) == 0) out.lane[i] &= 0x8000;
    }
    return same_bits<simde__m512i>(out);
}
inline __m256 extractf32x8_ps(simde__m512 x, int high) {
    struct Both {
        __m256 half[2];
    };
    return same_bits<Both>(x).half[high];
}
inline simde__mmask16 mask_cmp_ps_mask(simde__mmask16 mask, simde__m512 a, simde__m512 b, int how) {
    return (simde__mmask16)(mask & (how == _CMP_LE_OQ ? simde_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ) : 0));
}
inline simde__m512 maskz_loadu_ps(simde__mmask16 mask, const float* p) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.lane[i] = mask >> i & 1 ? p[i] : 0.0f;
    return same_bits<simde__m512>(out);
}
inline void mask_storeu_ps(float* p, simde__mmask16 mask, simde__m512 x) {
    Floats in = same_bits<Floats>(x);
    for (int i = 0; i < 16; ++i) {
        if (mask >> i & 1) p[i] = in.lane[i];
    }
}

}  // namespace emulated

#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_cvtepu16_epi32(x) emulated::cvtepu16_epi32(x)
#define _mm512_cvtepi32_epi16(x) emulated::cvtepi32_epi16(x)
#define _mm512_cvtepi32_ps(x) emulated::cvtepi32_ps(x)
#define _mm512_cvtps_epi32(x) emulated::cvtps_epi32(x)
#define _mm512_cvtph_ps(x) emulated::cvtph_ps(x)
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(sum, a, b)                                                        \
    simde_mm512_dpbf16_ps(sum, (simde__m512bh)emulated::normal_halves((simde__m512i)(a)), \
                          (simde__m512bh)emulated::normal_halves((simde__m512i)(b)))
#define _mm512_cvtneps_pbh(x) emulated::cvtneps_pbh(x)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(x, high) emulated::extractf32x8_ps(x, high)
#undef _mm512_mask_cmp_ps_mask
#define _mm512_mask_cmp_ps_mask(mask, a, b, how) emulated::mask_cmp_ps_mask(mask, a, b, how)
#define _mm512_maskz_loadu_ps(mask, p) emulated::maskz_loadu_ps(mask, p)
#define _mm512_mask_storeu_ps(p, mask, x) emulated::mask_storeu_ps(p, mask, x)
