// Weights in fixed point in 12 bits instead of 16: three quarters of the bytes where reading the weights is what takes the time. They are the
// very numbers of 16 bits: which of the two is multiplied by changes no bit.
//
// A number of 8 significant bits, which is all that a weight in bf16 has, is m 2^s, m signed and of 9 bits, s from 0 to 7. Its word holds m in
// bits 15 to 7 and 7 - s in bits 2 to 0; bits 6 to 3 are its hole. Of eight inputs of a panel the first six stand as in the panel, a word a
// number; the last two's words, whose own holes are empty, lie in the holes of the three before: bits 15 to 12 in that of the word six inputs
// before, 11 to 8 four inputs before, then 7, 2, 1 and 0. So [in / 2][outputs][2] words become [in / 8][3][outputs][2], and the scales follow.
#pragma once

namespace SLUICE_ISA {

constexpr int narrow_inputs = 8;  // that are packed together; a panel and a block of inputs have a multiple of them
constexpr int step_words = 2 * panel_outputs;

// Bytes before input k of a panel.
constexpr int64_t narrow_offset(int64_t k) { return k * panel_outputs * 3 / 2; }

// A number's word; its hole is 0. False: it has more than 8 significant bits.
inline bool narrow_word(int number, uint16_t& word) {
    const int bits = 32 - __builtin_clz((unsigned)(number < 0 ? ~number : number) | 1), s = std::max(bits - 8, 0);
    word = (uint16_t)((unsigned)(number >> s) << 7 | (unsigned)(7 - s));
    return (number & ((1 << s) - 1)) == 0;
}

inline bool pack_narrow_panel(const uint8_t* fixed, int64_t inputs, uint8_t* panel) {
    const int16_t* number = (const int16_t*)fixed;
    uint16_t* to = (uint16_t*)panel;
    bool all = true;
    for (int64_t k = 0; k < inputs; k += narrow_inputs, number += 4 * step_words, to += 3 * step_words) {
        for (int i = 0; i < step_words; ++i) {
            uint16_t word[4];
            for (int j = 0; j < 4; ++j) all &= narrow_word(number[j * step_words + i], word[j]);
            const unsigned last = word[3], holes[3] = {last >> 12, last >> 8 & 15, (last >> 4 & 8) | (last & 7)};
            for (int j = 0; j < 3; ++j) to[j * step_words + i] = (uint16_t)(word[j] | holes[j] << 3);
        }
    }
    std::memcpy(panel + narrow_offset(inputs), fixed + inputs * panel_outputs * 2, panel_outputs * 4);
    return all;
}

// Output `output` of a panel, input k.
inline int narrow_number(const uint8_t* panel, int output, int64_t k) {
    const uint16_t* words = (const uint16_t*)(panel + narrow_offset(k / narrow_inputs * narrow_inputs)) + 2 * output + k % 2;
    const int64_t step = k % narrow_inputs / 2;
    const auto hole = [&](int j) { return words[j * step_words] >> 3 & 15; };
    const int last = hole(0) << 12 | hole(1) << 8 | (hole(2) & 8) << 4 | (hole(2) & 7), word = step < 3 ? words[step * step_words] : last;
    return (int16_t)(word & 0xff80) >> (word & 7);
}

// A block in 16 bits, as the first tile makes it of its words: from the nearest cache the others read it faster than they could make it.
class Widened {
public:
    template <class>
    using Next = FixedTile;
    static constexpr int64_t asked = 96;

    uint8_t* kept() { return numbers_; }

private:
    alignas(64) uint8_t numbers_[fixed_block_most * panel_outputs * 2];
};

struct NarrowTile : FixedTile {
    using Room = Widened;

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
                        const auto words = [&](int i) SLUICE_HERE { return Simd::load_lanes(at + i * step_bytes); };
                        I numbers;
                        if constexpr (step < 3) numbers = Simd::widen_words(words(step));
                        else numbers = Simd::widen_holes(words(0), words(1), words(2));
                        if constexpr (asks != Asks::alone) Simd::store_lanes(ahead.kept + step * step_bytes + v * width * 4, numbers);
                        return numbers;
                    },
                    [](I s, I x, I b) SLUICE_HERE { return Simd::add_pair_products(s, x, b); });
            });
            if constexpr (asks != Asks::alone) ahead.kept += 4 * step_bytes;
        }
        scale_blocks(sum, a, stride, goes_on, sums);
    }
};

}  // namespace SLUICE_ISA
