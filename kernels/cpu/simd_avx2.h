// Eight float lanes of AVX2 with FMA (Haswell and Zen onwards).
//
// Every simd_*.h gives the same `Simd` in the namespace SLUICE_ISA, and the operators are written against it alone. Meanings that are
// not plain from a name stand here; the other files differ in width and instructions only. bf16 is a uint16_t: a float's high half.
// A "pair" is one 32-bit lane that holds two bf16 neighbours along the summed dimension, the earlier one low.
#pragma once

namespace SLUICE_ISA {

struct Simd {
    static constexpr int width = 8;
    static constexpr int panel_vectors = 2;   // of outputs that a linear's weights are kept in
    static constexpr int tile_rows = 6;       // rows x panel_vectors sums, the weights and what they are made of fill the registers
    static constexpr bool bf16_dot = false;   // one instruction multiplies and adds bf16 pairs into float lanes
    static constexpr bool matrices = false;   // whole matrices are multiplied, matrix_tiles.h
    static constexpr bool fixed_point = true; // sums of products of 16-bit numbers take fewer instructions than bf16's in floats
    static constexpr int byte_limit = 64;     // magnitude of an int8 weight up to which add_byte_products is exact
    static constexpr bool reads_ahead = false;  // memory that is read in order comes faster when nobody asks for it ahead
    static constexpr int64_t bytes_ahead = 0;   // of a lone high tile's weights, how far ahead the next are asked for; 0: a panel
    static constexpr bool narrow = false;     // whether fixed point is kept in 12 bits (narrow.h)
    static constexpr bool screens = true;     // products with a screen (screen.h) take no longer than those with the weight itself

    using F = __m256;
    using I = __m256i;

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }  // a * b + c
    static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

    // The first n lanes (0 < n <= width); the others read as 0 and are not written.
    static F load_n(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
    static void store_n(float* p, F x, int n) { _mm256_maskstore_ps(p, mask(n), x); }

    static F load_bf16(const uint16_t* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
    }
    // Rounds to nearest, ties to even; a NaN stays one.
    static void store_bf16(uint16_t* p, F x) {
        I bits = _mm256_castps_si256(x);
        I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        I nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        I high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
        I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
        _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
    }

    // Whole numbers in [0, 255].
    static void store_bytes(uint8_t* p, F x) {
        I lanes = _mm256_cvtps_epi32(x);
        __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
        _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
    }

    // Rounded to whole numbers, that fit 16 bits.
    static void store_words(int16_t* p, F x) {
        I lanes = _mm256_cvtps_epi32(x);
        _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1)));
    }

    // Lanes of 32 bits: pairs, or four bytes.
    static I load_lanes(const void* p) { return _mm256_loadu_si256((const I*)p); }
    static void store_lanes(void* p, I x) { _mm256_storeu_si256((I*)p, x); }
    static I set1_lane(const void* p) {
        int32_t lane;
        std::memcpy(&lane, p, 4);
        return _mm256_set1_epi32(lane);
    }
    // Lanes of pairs of 16-bit numbers, of signed bytes.
    static I widen_bytes(const void* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
    // The low, or high, halves of pairs.
    static F low(I pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
    // Two shifts, for a mask would hold a register that the tiles have not.
    static F high(I pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(pairs, 16), 16)); }

    static I zero_lanes() { return _mm256_setzero_si256(); }
    static F to_float(I lanes) { return _mm256_cvtepi32_ps(lanes); }
    static I sub_lanes(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I times_128(I x) { return _mm256_slli_epi32(x, 7); }
    // The low, or high, nibbles of the bytes, less 8.
    static I low_nibbles(I x) { return _mm256_sub_epi8(_mm256_and_si256(x, _mm256_set1_epi8(15)), _mm256_set1_epi8(8)); }
    static I high_nibbles(I x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
    // x is in a register here, and what was written before is computed before.
    static void hold(I& x) { asm volatile("" : "+x"(x)); }
    static void hold(F& x) { asm volatile("" : "+x"(x)); }
    // sum + a * b in sum's own register.
    static F add_product(F sum, F a, F b) {
        asm volatile("vfmadd231ps %[b], %[a], %[sum]" : [sum] "+x"(sum) : [a] "x"(a), [b] "xm"(b));
        return sum;
    }
    // sum + the two products of 16-bit numbers of a and b, lane by lane. Written out, for a full tile leaves one register, and of the same
    // instructions as intrinsics the compiler keeps some sums in memory.
    static I add_pair_products(I sum, I a, I b) {
        I product;
        asm volatile(
            "vpmaddwd %[b], %[a], %[product]\n\t"
            "vpaddd %[product], %[sum], %[sum]"
            : [sum] "+x"(sum), [product] "=&x"(product)
            : [a] "x"(a), [b] "xm"(b));
        return sum;
    }
    // sum + the four products of unsigned bytes of a and signed bytes of b, lane by lane. Two products are summed in 16 bits:
    // 2 * 255 * 64 fits.
    static I add_byte_products(I sum, I a, I b) {
        alignas(32) static constexpr int16_t ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        I product;
        asm volatile(
            "vpmaddubsw %[b], %[a], %[product]\n\t"
            "vpmaddwd %[ones], %[product], %[product]\n\t"
            "vpaddd %[product], %[sum], %[sum]"
            : [sum] "+x"(sum), [product] "=&x"(product)
            : [a] "x"(a), [b] "xm"(b), [ones] "m"(*(const I*)ones));
        return sum;
    }
    // The same in sums of 16 bits or more, made whole lanes by widen_small: for so few and so small products that they fit.
    static I add_small_products(I sum, I a, I b) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)); }
    static I widen_small(I sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
    // narrow.h: the numbers of words, and of what the holes of such words hold. Defined where `narrow` is true.
    static I widen_words(I words);
    static I widen_holes(I first, I second, I third);
    static F add_bf16_products(F sum, I a, I b);  // defined where bf16_dot is true
    static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

    // Fixed trees, so that a sum does not depend on the compiler.
    static float sum(F x) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    static float largest(F x) {
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    // 2^n for whole n in [-127, 127]; -127 gives 0.
    // Whether a lane of x is not below the limit, or no number.
    static bool any_not_below(F x, F limit) { return _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ)) != 0; }
    // sum + w where x <= limit, sum elsewhere.
    static F add_where_not_above(F sum, F x, F limit, F w) {
        return _mm256_add_ps(sum, _mm256_and_ps(w, _mm256_cmp_ps(x, limit, _CMP_LE_OQ)));
    }
    // Bit i: low < lane i <= high.
    static uint32_t lanes_between(F x, F low, F high) {
        return (uint32_t)_mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(low, x, _CMP_LT_OQ), _mm256_cmp_ps(x, high, _CMP_LE_OQ)));
    }
    static F power_of_two(F n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
    }

private:
    static I mask(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
};

}  // namespace SLUICE_ISA
