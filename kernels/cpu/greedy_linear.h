// The greatest output of each row of a packed linear, without writing the outputs: what `greedy` would say of them, bit for bit.
//
// The product leaves one number a row and panel that none of the panel's outputs exceeds: their greatest, or, of few rows and where there is
// a screen (screen.h), an upper bound from half the bytes. A row then computes outputs exactly as `linear` does, panel by panel, the
// most promising first, until no other panel can hold its answer. Rows of which too many panels could, or that are not to be screened, have the
// product itself.
#pragma once

namespace SLUICE_ISA {

using sluice::GreedyLinear;

constexpr int64_t unanswered = -2;
constexpr int64_t panels_looked_at = 16;  // one in so many at most before a row has the product itself,
constexpr int64_t panels_at_least = 8;    // or so many

// Where matrices are multiplied, more rows than this take longer with the screen's pairs than with twice the bytes.
constexpr int64_t rows_screened = Simd::matrices ? 16 : INT64_MAX;

// Each panel's greatest output; infinite where it holds NaN or +inf, which both mean that the row has no answer.
struct PanelMaxima {
    float* maxima;  // [rows, panels]
    int64_t panels;

    void prepared(const PackedHeader&, const float*, float*) const {}

    template <class Tile>
    void finish(const Product<Tile>& product, int64_t row, int64_t count, int64_t panel, const float* sums, const float*, int64_t stride) const {
        for (int64_t r = 0; r < count; ++r) finish_row(product, row + r, panel, sums + r * stride);
    }

private:
    template <class Tile>
    void finish_row(const Product<Tile>& product, int64_t row, int64_t panel, const float* sums) const {
        const F above = Simd::set1(INFINITY);
        F most = Simd::set1(-INFINITY);
        bool none = false;
        for (int v = 0; v < panel_vectors; ++v) {
            const int64_t output = panel * panel_outputs + v * width;
            if (output >= product.outputs) break;
            F x = product.value(row, panel, sums, v);
            if (const int n = lanes_left(output, product.outputs); n < width) {
                float lanes[width];
                Simd::store(lanes, x);
                std::fill(lanes + n, lanes + width, -INFINITY);
                x = Simd::load(lanes);
            }
            none |= Simd::any_not_below(x, above);
            most = Simd::max(most, x);
        }
        maxima[row * panels + panel] = none ? INFINITY : Simd::largest(most);
    }
};

// What no output of a panel exceeds. A row's scale is how far it reaches.
struct PanelBounds {
    float* maxima;  // [rows, panels]
    int64_t panels;

    void prepared(const PackedHeader& header, const float* floats, float* reach) const { *reach = reach_of(floats, header.in_features); }

    template <class Tile>
    void finish(const Product<Tile>& product, int64_t row, int64_t count, int64_t panel, const float* sums, const float*, int64_t stride) const {
        const uint8_t* after = product.after(panel);
        for (int64_t end = row + count; row < end; ++row, sums += stride) {
            const F reach = Simd::set1(product.row_scales[row]);
            const auto* prepared = product.rows + row * product.stride;
            F most = Simd::set1(-INFINITY);
            for (int v = 0; v < panel_vectors; ++v) most = Simd::max(most, upper_bound<Tile>(prepared, reach, sums, after, v));
            maxima[row * panels + panel] = Simd::largest(most);
        }
    }
};

// The answer of the one row of `product`, of numbers [panels] that its panels do not exceed; `unanswered` when it takes more than `most`
// panels. Overwrites the numbers.
template <class Tile>
inline int64_t best_output(Product<Tile>& product, float* maxima, int64_t panels, int64_t most) {
    float values[panel_outputs];
    Best best{-INFINITY, INT64_MAX};
    for (int64_t looked_at = 0;; ++looked_at) {
        const Best next = best_of(maxima, panels);
        // Of equal outputs the first is the answer.
        if (next.value < best.value || next.value == -INFINITY) break;
        if (next.value == best.value && next.index > best.index / panel_outputs) break;
        if (looked_at == most) return unanswered;
        maxima[next.index] = -INFINITY;
        product.values(0, next.index, values);
        const int64_t first = next.index * panel_outputs;
        const Best found = best_of(values, std::min<int64_t>(panel_outputs, product.outputs - first));
        if (!(found.value < INFINITY)) return -1;
        if (found.value > best.value || (found.value == best.value && first + found.index < best.index)) {
            best = {found.value, first + found.index};
        }
    }
    return is_finite(best.value) ? best.index : -1;
}

// Of each row, from the numbers that its panels do not exceed.
template <class Tile>
inline void search_rows(const Linear& call, float* maxima, int64_t panels, bool screened, int64_t* tokens) {
    using Parts = Product<Tile>;
    const PackedHeader& header = *(const PackedHeader*)call.packed;
    const int64_t most = screened ? std::max(panels / panels_looked_at, panels_at_least) : panels;
    sluice::parallel(call.rows, 1, [&](sluice::Share& share) {
        const int64_t float_bytes = round_up(header.inputs * 4, 64), sum_bytes = Parts::sum_bytes(call, header);
        uint8_t* own = scratch(1, float_bytes + sum_bytes + Parts::shared_bytes(1, header.inputs));
        float* floats = (float*)own;
        for (int64_t first, last; share.take(first, last);) {
            for (int64_t row = first; row < last; ++row) {
                Linear one = call;
                one.rows = 1;
                one.x = (const uint8_t*)call.x + row * header.in_features * (call.x_type == Type::f32 ? 4 : 2);
                if (screened) {
                    read_row(one, 0, header.in_features, floats);
                    tokens[row] = unanswered;
                    if (!is_finite(reach_of(floats, header.in_features))) continue;
                }
                Parts product(one, own + float_bytes + sum_bytes, (float*)(own + float_bytes));
                product.prepare(0, 1, floats, Outputs{one});
                tokens[row] = best_output(product, maxima + row * panels, panels, most);
            }
        }
    });
}

template <class Tile>
inline void best_outputs(const Linear& call, const void* screen, int64_t* tokens) {
    const PackedHeader& header = *(const PackedHeader*)call.packed;
    const int64_t panels = num_panels(header.out_features, false);
    float* maxima = (float*)scratch(2, call.rows * panels * (int64_t)sizeof(float));
    if (!screen || call.rows > rows_screened) {
        run_product<Tile>(call, PanelMaxima{maxima, panels});
        return search_rows<Tile>(call, maxima, panels, false, tokens);
    }
    Linear coarse = call;
    coarse.packed = screen;
    run_product<CoarseTile>(coarse, PanelBounds{maxima, panels});
    search_rows<Tile>(call, maxima, panels, true, tokens);
    // Those that are left, together.
    Linear others = call;
    others.rows = std::count(tokens, tokens + call.rows, unanswered);
    if (others.rows == 0) return;
    const int64_t bytes = header.in_features * (call.x_type == Type::f32 ? 4 : 2);
    uint8_t* x = scratch(3, others.rows * (bytes + (int64_t)sizeof(int64_t)) + 64);
    int64_t* found = (int64_t*)(x + round_up(others.rows * bytes, 8));
    others.x = x;
    for (int64_t row = 0; row < call.rows; ++row) {
        if (tokens[row] != unanswered) continue;
        std::memcpy(x, (const uint8_t*)call.x + row * bytes, (size_t)bytes);
        x += bytes;
    }
    best_outputs<Tile>(others, nullptr, found);
    for (int64_t row = 0; row < call.rows; ++row) {
        if (tokens[row] == unanswered) tokens[row] = *found++;
    }
}

inline void greedy_linear(const GreedyLinear& call) {
    if (call.rows == 0) return;
    const Linear linear{call.x, call.rows, call.type, call.packed, call.norm_weight, call.eps, nullptr, nullptr, Type::f32, nullptr, Type::f32};
    with_tile(call.packed, [&](auto tile) { best_outputs<decltype(tile)>(linear, call.screen, call.tokens); });
}

}  // namespace SLUICE_ISA
