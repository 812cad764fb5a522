// What a screen's rows are and how they are multiplied (screen.h says what for).
//
// Where bytes are multiplied exactly, rows have 8 bits too, in products twice as fast as those of 16. What a row's few large numbers would
// cost the others is kept apart: the `fine_inputs` that weigh most, which the screen's table names and has stand first, are given as two
// bytes of one number, 128 times the first and the second, and are multiplied twice. Elsewhere rows are pairs of 16 bits (tiles.h).
#pragma once

namespace SLUICE_ISA {

// Of `inputs`, a multiple of 8. As many as keep 16 bits' sums within 32: 129 * 255 * 127 * 512 fits.
constexpr int64_t fine_inputs(int64_t inputs) { return std::min<int64_t>({round_up(inputs / 6, 16), inputs, 512}); }

// Of a row: its first bytes, second bytes, then the bytes of the other inputs, each 128 too high.
enum class ScreenByte : uint8_t {};

// What stands before them.
struct ScreenRow {
    float fine_scale;  // of fine inputs' numbers
    float scale;       // of others'
    float error;       // at least |y - ^y|
    float unused;
};

// After a panel's inputs: float scales, int32 what the excess of 128 adds to fine inputs' sums and to the others', float bounds a |y|, float
// bounds a |y - ^y|.
struct ByteScreenTile : OneBlock {
    using Row = ScreenByte;
    static constexpr int max_rows = Simd::tile_rows;

    static constexpr int64_t row_block(int64_t inputs) { return (int64_t)sizeof(ScreenRow) + fine_inputs(inputs) + inputs; }
    static constexpr int64_t part_inputs(int) { return 0; }
    static constexpr int64_t row_offset(int64_t, int64_t) { return 0; }
    static constexpr int64_t panel_offset(int64_t k, int) { return k * panel_outputs; }
    static F total(const float* sums, const uint8_t* after, int v) {
        return Simd::mul(Simd::load(sums + v * width), Simd::load((const float*)after + v * width));
    }

    template <int R, int C, Asks asks>
    static void add(const Row* a, int64_t stride, const uint8_t* w, int64_t panel_bytes, int64_t inputs, int group, Ahead ahead, bool,
                    float* sums) {
        constexpr int V = panel_vectors * C;
        const int64_t fine = fine_inputs(inputs);
        const Row* bytes = a + sizeof(ScreenRow);
        const uint8_t* excess = w + panel_offset(inputs, group) + 4 * panel_outputs;
        I sum[R][V];
        clear_tile(sum);
        add_bytes<R, C, asks>(sum, bytes, stride, w, panel_bytes, fine, ahead);
        each<R>([&](auto r) SLUICE_HERE { each<V>([&](auto v) SLUICE_HERE { sum[r][v] = Simd::times_128(sum[r][v]); }); });
        add_bytes<R, C, asks>(sum, bytes + fine, stride, w, panel_bytes, fine, ahead);
        put<false>(sum, a, stride, offsetof(ScreenRow, fine_scale), excess, panel_bytes, sums);
        clear_tile(sum);
        add_bytes<R, C, asks>(sum, bytes + 2 * fine, stride, w + panel_offset(fine, group), panel_bytes, inputs - fine, ahead);
        put<true>(sum, a, stride, offsetof(ScreenRow, scale), excess + 4 * panel_outputs, panel_bytes, sums);
    }

private:
    // In floats, added to what stands in `sums` or instead of it.
    template <bool adds, int R, int V>
    SLUICE_INLINE static void put(const I (&sum)[R][V], const Row* a, int64_t stride, int64_t scale_at, const uint8_t* excess,
                                  int64_t panel_bytes, float* sums) {
        each<R>([&](auto r) SLUICE_HERE {
            float row_scale;
            std::memcpy(&row_scale, a + r * stride + scale_at, sizeof row_scale);
            const F scale = Simd::set1(row_scale);
            each<V>([&](auto v) SLUICE_HERE {
                float* all = sums + (r * V + v) * width;
                const I exact = Simd::sub_lanes(sum[r][v], Simd::load_lanes(vector_at<4>(excess, panel_bytes, v)));
                Simd::store(all, Simd::fma(Simd::to_float(exact), scale, adds ? Simd::load(all) : Simd::zero()));
            });
        });
    }
};

using CoarseTile = std::conditional_t<screens_by_bytes, ByteScreenTile, PairTile<1>>;

// What vector v of a panel's outputs does not exceed, of its sums with the row that was prepared so; `reach`: at least |y|.
template <class Tile>
SLUICE_INLINE F upper_bound(const typename Tile::Row* prepared, F reach, const float* sums, const uint8_t* after, int v) {
    const float* bounds = (const float*)after + (screens_by_bytes ? 3 : 1) * panel_outputs + v * width;
    const F most = Simd::fma(reach, Simd::load(bounds), Tile::total(sums, after, v));
    if constexpr (!screens_by_bytes) return most;
    ScreenRow row;
    std::memcpy(&row, prepared, sizeof row);
    return Simd::fma(Simd::set1(row.error), Simd::load(bounds + panel_outputs), most);
}

// Whole numbers [0, n) of x, n at most a vector's, 128 too high.
inline void store_screen_bytes(ScreenByte* out, F x, int n) {
    uint8_t bytes[width];
    Simd::store_bytes(bytes, Simd::add(x, Simd::set1(128.0f)));
    std::memcpy(out, bytes, (size_t)n);
}

inline void prepare_row(const Linear& call, int64_t row, int64_t in, int64_t inputs, ScreenByte* out, float* floats, float*) {
    const PackedHeader& header = *(const PackedHeader*)call.packed;
    read_row(call, row, in, floats);
    if (header.group) {
        uint16_t rounded[width];
        for (int64_t i = 0; i < in; i += width) {
            const int n = lanes_left(i, in);
            store_typed(rounded, 0, load_typed(floats, i, n, Type::f32), n, Type::bf16);
            store_typed(floats, i, load_typed(rounded, 0, n, Type::bf16), n, Type::f32);
        }
    }
    float* y = (float*)scratch(4, inputs * (int64_t)sizeof(float));
    const int32_t* order = (const int32_t*)(&header + 1);
    for (int64_t i = 0; i < in; ++i) y[i] = floats[order[i]];
    for (int64_t i = in; i < inputs; ++i) y[i] = 0.0f;

    const int64_t fine = fine_inputs(inputs);
    const float fine_largest = largest_magnitude(y, fine), largest = largest_magnitude(y + fine, inputs - fine);
    const float fine_limit = 127.0f * 128.0f, limit = 127.0f;
    ScreenRow made{fine_largest / fine_limit, largest / limit, 0.0f, 0.0f};
    const F fine_inverse = Simd::set1(fine_largest > 0.0f ? fine_limit / fine_largest : 0.0f), fine_scale = Simd::set1(made.fine_scale);
    const F inverse = Simd::set1(largest > 0.0f ? limit / largest : 0.0f), scale = Simd::set1(made.scale);
    F squares = Simd::zero();
    auto apart = [&](F x, F q, F step) {
        const F error = Simd::sub(x, Simd::mul(q, step));
        squares = Simd::fma(error, error, squares);
    };
    ScreenByte* to = out + sizeof(ScreenRow);
    for (int64_t i = 0; i < fine; i += width) {
        const int n = lanes_left(i, fine);
        const F x = load_typed(y, i, n, Type::f32), q = Simd::round(Simd::mul(x, fine_inverse));
        const F high = Simd::round(Simd::mul(q, Simd::set1(1.0f / 128.0f)));
        store_screen_bytes(to + i, high, n);
        store_screen_bytes(to + fine + i, Simd::fma(high, Simd::set1(-128.0f), q), n);
        apart(x, q, fine_scale);
    }
    to += 2 * fine;
    for (int64_t i = fine; i < inputs; i += width) {
        const int n = lanes_left(i, inputs);
        const F x = load_typed(y, i, n, Type::f32), q = Simd::round(Simd::mul(x, inverse));
        store_screen_bytes(to + i - fine, q, n);
        apart(x, q, scale);
    }
    made.error = std::sqrt(Simd::sum(squares)) * (1.0f + (float)(in + 64) * 0x1p-23f);
    std::memcpy(out, &made, sizeof made);
}

}  // namespace SLUICE_ISA
