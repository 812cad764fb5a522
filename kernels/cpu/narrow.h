// A second copy of weights in fixed point, in 12 bits instead of 16, for products of so few rows that reading the weights is what takes the
// time. It holds the very numbers that the panels hold: which of the two is multiplied by changes no bit.
//
// A number of 8 significant bits, which is all that a weight in bf16 has, is m 2^s, m signed and of 9 bits, s from 0 to 7. Its word holds m in
// bits 15 to 7 and 7 - s in bits 2 to 0; bits 6 to 3 are its hole. Of eight inputs of a panel the first six stand as in the panel, a word a
// number; the last two's words, whose own holes are empty, lie in the holes of the three before: bits 15 to 12 in that of the word six inputs
// before, 11 to 8 four inputs before, then 7, 2, 1 and 0. So [in / 2][outputs][2] words become [in / 8][3][outputs][2], and what a panel has
// behind its inputs follows.
#pragma once

namespace SLUICE_ISA {

constexpr int narrow_inputs = 8;  // that are packed together; a panel and a block of inputs have a multiple of them

// Bytes before input k of a panel.
constexpr int64_t narrow_offset(int64_t k) { return k * panel_outputs * 3 / 2; }

// A number's word; its hole is 0. False: it has more than 8 significant bits.
inline bool narrow_word(int number, uint16_t& word) {
    const int bits = 32 - __builtin_clz((unsigned)(number < 0 ? ~number : number) | 1), s = std::max(bits - 8, 0);
    word = (uint16_t)((unsigned)(number >> s) << 7 | (unsigned)(7 - s));
    return (number & ((1 << s) - 1)) == 0;
}

// Of a panel and its scales. False: one of its numbers has more than 8 significant bits.
inline bool narrow_panel(const uint8_t* panel, int64_t inputs, uint8_t* narrow) {
    constexpr int lane_words = 2 * panel_outputs;
    const int16_t* number = (const int16_t*)panel;
    uint16_t* to = (uint16_t*)narrow;
    bool all = true;
    for (int64_t k = 0; k < inputs; k += narrow_inputs, number += 4 * lane_words, to += 3 * lane_words) {
        for (int i = 0; i < lane_words; ++i) {
            uint16_t word[4];
            for (int j = 0; j < 4; ++j) all &= narrow_word(number[j * lane_words + i], word[j]);
            const unsigned last = word[3], holes[3] = {last >> 12, last >> 8 & 15, (last >> 4 & 8) | (last & 7)};
            for (int j = 0; j < 3; ++j) to[j * lane_words + i] = (uint16_t)(word[j] | holes[j] << 3);
        }
    }
    std::memcpy(narrow + narrow_offset(inputs), panel + inputs * panel_outputs * 2, panel_outputs * 4);
    return all;
}

inline uint8_t* narrow_panels(const PackedHeader& header) {
    return (uint8_t*)&header + header.panels + num_panels(header.out_features, header.gated) * header.panel_bytes;
}

// Fills the room behind the panels of a weight in fixed point, and says so in its header unless a number does not fit.
inline void pack_narrow(void* packed) {
    PackedHeader& header = *(PackedHeader*)packed;
    const uint8_t* panels = (const uint8_t*)packed + header.panels;
    uint8_t* narrow = narrow_panels(header);
    const int64_t bytes = narrow_size(header.inputs);
    bool all = true;
    sluice::parallel(num_panels(header.out_features, header.gated), std::max<int64_t>(65536 / bytes, 1), [&](sluice::Share& share) {
        bool mine = true;
        for (int64_t first, last; share.take(first, last);) {
            for (int64_t i = first; i < last; ++i) mine &= narrow_panel(panels + i * header.panel_bytes, header.inputs, narrow + i * bytes);
        }
        if (!mine) __atomic_store_n(&all, false, __ATOMIC_RELAXED);
    });
    header.group = all;
}

struct NarrowTile : FixedTile {
    static_assert(Simd::narrow_rows <= max_rows);
    static constexpr bool shares_blocks = false;

    static constexpr int64_t panel_offset(int64_t k, int) { return narrow_offset(k); }

    template <int R, int C, Asks asks>
    static void add(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int, Ahead ahead, bool goes_on,
                    float* sums) {
        I sum[R][panel_vectors * C];
        clear_tile(sum);
        const RowsAt<Row, R> row(a + fixed_scale_words, stride);
        for (int64_t k = 0; k < inputs; k += narrow_inputs, w += 3 * step_bytes) {
            prefetch<R, C, asks, 3>(w, panel_bytes, ahead);
            each<4>([&](auto step) SLUICE_HERE {
                add_products(
                    sum, [&](int r) SLUICE_HERE { return Simd::set1_lane(row[r] + k + 2 * step); },
                    [&](int v) SLUICE_HERE {
                        const uint8_t* at = vector_at<4>(w, panel_bytes, v);
                        if constexpr (step < 3) return Simd::widen_words(at + step * step_bytes);
                        else return Simd::widen_holes(at, at + step_bytes, at + 2 * step_bytes);
                    },
                    [](I s, I x, I b) SLUICE_HERE { return Simd::add_pair_products(s, x, b); });
            });
        }
        scale_blocks(sum, a, stride, goes_on, sums);
    }
};

}  // namespace SLUICE_ISA
