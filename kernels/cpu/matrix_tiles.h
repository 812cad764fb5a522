// The products of tiles.h where the processor multiplies matrices (AMX): 16 or 32 rows by a panel at a time, whatever the number of rows.
//
// Panels are as tiles.h has them: a step of 32 bf16 or 64 bytes of a row's inputs is 16 of its steps, which is how the instruction wants
// the second matrix. A sum takes its steps in order, each rounded by itself, so that here, too, other rows change nothing.
#pragma once

namespace SLUICE_ISA {

#ifdef SLUICE_AMX

namespace amx = sluice::amx;

// Registers 0, 1, 2: sums of up to 16 rows, a vector of the panel's outputs each; 3, 4, 5: of 16 more; 6: rows, 7: weights.
static_assert(panel_vectors == 3 && width == 16);

// Memory is asked for all the time, since that is what few rows wait for: what is multiplied next while one panel is, and while what
// follows the product is computed, by how long each takes; of fewer rows, where that is little, the weights a little ahead.
constexpr int64_t rows_asking_near = 16, near_bytes = 2048;
constexpr int64_t step_cycles = 64, finish_cycles = 64;  // of 16 rows' step, of a row

class WeightsAhead {
public:
    // `next`: where so many bytes lie that are wanted when `count` rows have had `steps` steps each and have been finished.
    void begin(const uint8_t* next, int64_t bytes, int64_t count, int64_t steps) {
        near_ = count <= rows_asking_near;
        if (near_) return;
        if (at_ < next || at_ > next + bytes) at_ = until_ = next;
        const int64_t groups = (count + amx::tile_rows - 1) / amx::tile_rows;
        a_cycle_ = (float)bytes / (float)(groups * steps * step_cycles + count * finish_cycles);
    }

    // `w`: the step's weights; `groups`: of 16 rows.
    SLUICE_INLINE void step(const uint8_t* w, int64_t bytes, int groups) {
        if (near_) {
            for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(w + near_bytes + b);
        } else {
            ask(step_cycles * groups);
        }
    }

    SLUICE_INLINE void finish() {
        if (!near_) ask(finish_cycles);
    }

private:
    // Into the second cache: the nearest holds hardly more than the panel under way.
    SLUICE_INLINE void ask(int64_t cycles) {
        until_ += (int64_t)(a_cycle_ * (float)cycles);
        for (; at_ < until_; at_ += 64) __builtin_prefetch(at_, 0, 2);
    }

    const uint8_t* at_ = nullptr;
    const uint8_t* until_ = nullptr;
    float a_cycle_ = 0.0f;
    bool near_ = false;
};

// The rows that the registers of a thread are shaped for; gives them back in the end, since all that they hold would be kept at every
// change of threads.
class RowShape {
public:
    ~RowShape() {
        if (rows_) amx::release();
    }

    // shape(t): bytes of a row, and rows, of register t.
    template <class Shape>
    void set(int64_t rows, const Shape& shape) {
        if (rows == rows_) return;
        rows_ = rows;
        amx::Shapes shapes;
        for (int t = 0; t < 8; ++t) std::tie(shapes.bytes[t], shapes.rows[t]) = shape(t);
        amx::configure(shapes);
    }

private:
    int64_t rows_ = 0;
};

// `Base`: Bf16Tile or Int8Tile.
template <class Base, bool bytes>
struct MatrixTile : Base {
    using Row = typename Base::Row;
    static constexpr bool matrices = true;
    static constexpr int max_rows = 2 * amx::tile_rows;
    static constexpr int64_t step_inputs = amx::row_bytes / (int64_t)sizeof(Row);
    static constexpr int64_t weight_bytes = 16 * step_bytes;  // of a step

    static constexpr int64_t row_block(int64_t inputs) { return inputs; }
    static constexpr int64_t steps(int64_t inputs) { return inputs / step_inputs; }

    // How many of `rows` are multiplied next.
    static constexpr int64_t rows_of_next(int64_t rows) { return rows >= max_rows ? max_rows : std::min<int64_t>(rows, amx::tile_rows); }

    // `count` rows, as many as rows_of_next gave, by the panel at `w`: `sums` [count][panel_outputs].
    static void multiply(RowShape& shape, WeightsAhead& ahead, int64_t count, const Row* a, int64_t stride, const uint8_t* w, int64_t inputs,
                         float* sums) {
        const int64_t rows = std::min<int64_t>(count, amx::tile_rows);
        shape.set(rows, [rows](int t) { return std::pair(amx::row_bytes, t == 7 ? amx::tile_rows : rows); });
        if (count == max_rows) multiply_group<2>(ahead, a, stride, w, steps(inputs), sums);
        else multiply_group<1>(ahead, a, stride, w, steps(inputs), sums);
    }

private:
    template <int halves>
    static void multiply_group(WeightsAhead& ahead, const Row* a, int64_t stride, const uint8_t* w, int64_t steps, float* sums) {
        const int64_t row_stride = stride * (int64_t)sizeof(Row);
        each<3 * halves>([&](auto i) SLUICE_HERE { amx::zero<i>(); });
        for (int64_t k = 0; k < steps; ++k, a += step_inputs, w += weight_bytes) {
            ahead.step(w, weight_bytes, halves);
            each<halves>([&](auto half) SLUICE_HERE {
                amx::load<6>(a + half * amx::tile_rows * stride, row_stride);
                each<3>([&](auto v) SLUICE_HERE {
                    amx::load<7>(w + v * amx::row_bytes, step_bytes);
                    if constexpr (bytes) amx::add_byte_products<3 * half + v, 6, 7>();
                    else amx::add_bf16_products<3 * half + v, 6, 7>();
                });
            });
        }
        each<3 * halves>([&](auto i) SLUICE_HERE { amx::store<i>(sums + sum_place(i), panel_outputs * 4); });
    }

    static constexpr int64_t sum_place(int i) { return i / 3 * amx::tile_rows * panel_outputs + i % 3 * width; }
};

using Bf16Matrix = MatrixTile<Bf16Tile, false>;
using Int8Matrix = MatrixTile<Int8Tile, true>;

#else

struct RowShape {};
struct WeightsAhead {
    void begin(const uint8_t*, int64_t, int64_t, int64_t) {}
    void finish() {}
};
using Bf16Matrix = Bf16Tile;
using Int8Matrix = Int8Tile;

#endif

template <class Tile>
constexpr bool multiplies_matrices = requires { Tile::matrices; };

}  // namespace SLUICE_ISA
