// Sixteen float lanes of AVX-512 (F, BW, DQ, VL); SLUICE_VNNI, SLUICE_BF16 and SLUICE_AMX add those extensions. Meanings: simd_avx2.h.
#pragma once

namespace SLUICE_ISA {

struct Simd {
    static constexpr int width = 16;
    static constexpr int panel_vectors = 3;
    static constexpr int tile_rows = 8;
    static constexpr bool screens = true;
#ifdef SLUICE_BF16
    // On AMD's processors, then (dispatch.cpp). Zen 4: steps of 8 rows take 10 % longer when weights are asked for, of 32 rows over 512
    // tokens each 5 % when the cache is.
    static constexpr bool reads_ahead = true;
    static constexpr bool bf16_dot = true;
#else
    static constexpr bool reads_ahead = false;
    static constexpr bool bf16_dot = false;
#endif
#ifdef SLUICE_AMX
    static constexpr bool matrices = true;
#else
    static constexpr bool matrices = false;
#endif
    // Cascade Lake: of a panel ahead much has left the first cache again before it is multiplied. Not measured where there is AMX.
    static constexpr int64_t bytes_ahead = reads_ahead || matrices ? 0 : 6144;
#ifdef SLUICE_VNNI
    static constexpr bool fixed_point = !bf16_dot && !matrices;
    static constexpr bool narrow = fixed_point;
    static constexpr int byte_limit = 127;
#else
    static constexpr bool fixed_point = false;  // a product and a sum take as long as two products in floats
    static constexpr bool narrow = false;
    static constexpr int byte_limit = 64;
#endif

    using F = __m512;
    using I = __m512i;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F round(F a) { return _mm512_roundscale_ps(a, 8); }

    static F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
    static void store_n(float* p, F x, int n) { _mm512_mask_storeu_ps(p, mask(n), x); }

    static F load_bf16(const uint16_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
    }
#ifdef SLUICE_BF16
    // Numbers below 2^-126 become 0.
    static void store_bf16(uint16_t* p, F x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
#else
    static void store_bf16(uint16_t* p, F x) {
        I bits = _mm512_castps_si512(x);
        I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        I high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16);
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(high));
    }
#endif

    static void store_bytes(uint8_t* p, F x) {
        __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x));
        _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }

    static void store_words(int16_t* p, F x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x))); }

    static I load_lanes(const void* p) { return _mm512_loadu_si512(p); }
    static void store_lanes(void* p, I x) { _mm512_storeu_si512(p, x); }
    static I set1_lane(const void* p) {
        int32_t lane;
        std::memcpy(&lane, p, 4);
        return _mm512_set1_epi32(lane);
    }
    static I widen_bytes(const void* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
    static I widen_words(I words) {
        const I shift = _mm512_and_si512(words, _mm512_set1_epi16(7));
        return _mm512_srav_epi16(_mm512_and_si512(words, _mm512_set1_epi16((short)0xff80)), shift);
    }
    static I widen_holes(I first, I second, I third) {
        constexpr int choose = 0xca;  // where the first has a bit the second's, else the third's
        const I high = _mm512_set1_epi16((short)0xf000), higher = _mm512_set1_epi16((short)0xff00);
        const I both = _mm512_ternarylogic_epi32(high, _mm512_slli_epi16(first, 9), _mm512_slli_epi16(second, 5), choose);
        const I all = _mm512_ternarylogic_epi32(higher, both, _mm512_slli_epi16(third, 1), choose);
        const I shift = _mm512_and_si512(_mm512_srli_epi16(third, 3), _mm512_set1_epi16(7));
        return _mm512_srav_epi16(_mm512_and_si512(all, _mm512_set1_epi16((short)0xff80)), shift);
    }
    static F low(I pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
    static F high(I pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000))); }
    // sum + a.low * b.low + a.high * b.high, lane by lane.
#ifdef SLUICE_BF16
    static F add_bf16_products(F sum, I a, I b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#else
    static F add_bf16_products(F sum, I a, I b);
#endif

    static void hold(F&) {}  // floats stay where they are without it
#ifdef SLUICE_EMULATED       // tests: a vector is no register
    static void hold(I&) {}
#else
    static void hold(I& x) { asm volatile("" : "+v"(x)); }
#endif
    static F add_product(F sum, F a, F b) { return fma(a, b, sum); }
    static I zero_lanes() { return _mm512_setzero_si512(); }
    static F to_float(I lanes) { return _mm512_cvtepi32_ps(lanes); }
    static I sub_lanes(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I times_128(I x) { return _mm512_slli_epi32(x, 7); }
    static I low_nibbles(I x) { return _mm512_sub_epi8(_mm512_and_si512(x, _mm512_set1_epi8(15)), _mm512_set1_epi8(8)); }
    static I high_nibbles(I x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
#ifdef SLUICE_VNNI
    static I add_pair_products(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
    static I add_byte_products(I sum, I a, I b) { return _mm512_dpbusd_epi32(sum, a, b); }
    static I add_small_products(I sum, I a, I b) { return _mm512_dpbusd_epi32(sum, a, b); }
    static I widen_small(I sum) { return sum; }
#else
    static I add_pair_products(I sum, I a, I b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
    static I add_byte_products(I sum, I a, I b) {
        return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
    }
    static I add_small_products(I sum, I a, I b) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, b)); }
    static I widen_small(I sum) { return _mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
#endif
    static F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

    static float sum(F x) {
        __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    static float largest(F x) {
        __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    static bool any_not_below(F x, F limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ) != 0; }
    static F add_where_not_above(F sum, F x, F limit, F w) {
        return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(x, limit, _CMP_LE_OQ), sum, w);
    }
    static uint32_t lanes_between(F x, F low, F high) {
        return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(low, x, _CMP_LT_OQ), x, high, _CMP_LE_OQ);
    }
    static F power_of_two(F n) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
    }

private:
    static __mmask16 mask(int n) { return (__mmask16)((1u << n) - 1u); }
};

}  // namespace SLUICE_ISA
