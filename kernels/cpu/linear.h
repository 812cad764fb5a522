// A packed linear layer for every number of rows: norm before, bias, SiLU(gate)·up and residual after, rounded once.
//
// Threads take runs of panels. Few rows are prepared by every thread for itself, which is cheaper than waiting for each other. Many rows
// are walked in blocks that stay in a core's cache.
#pragma once

namespace SLUICE_ISA {

constexpr int64_t rows_prepared_apart = 2;
constexpr int64_t inputs_prepared_at_once = 8192;
constexpr int64_t products_at_once = 786432;  // of few rows some 20 us of a thread
constexpr int64_t row_block_bytes = (Simd::matrices ? 1024 : 192) << 10, row_block = Simd::matrices ? 512 : 240;  // a block's rows: at most
constexpr int64_t rows_in_parts = 48;  // where fewer whole rows fit, rows are multiplied part by part,
constexpr int64_t part_bytes = 384 << 10, panels_of_part = 4;  // each part by so many panels at most
constexpr int64_t stretches_of_parts = 10;  // a thread's, at least where there are as many

// What a linear of one format knows of itself while it runs.
template <class Tile>
struct Product {
    using Row = typename Tile::Row;
    using Room = typename Tile::Room;
    using NextTile = typename Room::template Next<Tile>;

    const Linear& call;
    const PackedHeader& header;
    int64_t inputs;
    int64_t outputs;
    const uint8_t* panels;
    int64_t panel_bytes;
    int64_t stride;   // elements of a row
    Row* rows;        // [call.rows, stride]
    float* row_scales;
    float* sums;      // of the rows and panels under way: sum_bytes

    // Whole rows that fit a core's cache beside what they are multiplied by.
    static int64_t rows_fitting(int64_t inputs) { return row_block_bytes / (row_elements(inputs) * (int64_t)sizeof(Row)); }

    // Whether so many rows are multiplied part by part, since whole ones would be so few at a time that the weights came from memory again
    // and again.
    static bool in_parts(int64_t rows, const PackedHeader& header) {
        if (multiplies_matrices<Tile> || Tile::part_inputs(header.group) == 0 || rows <= Tile::max_rows) return false;
        const int64_t fitting = rows_fitting(header.inputs);
        return fitting < std::min(rows, rows_in_parts);
    }

    // Rows of one of the fewest nearly equal blocks, a whole number of tiles.
    static int64_t rows_at_once(int64_t rows, const PackedHeader& header) {
        const int64_t fitting = in_parts(rows, header) ? row_block : std::min(row_block, rows_fitting(header.inputs));
        const int64_t most = std::max<int64_t>(fitting / Tile::max_rows, 1) * Tile::max_rows, blocks = (rows + most - 1) / most;
        return round_up((rows + blocks - 1) / blocks, Tile::max_rows);
    }

    // Inputs of one of the fewest nearly equal parts.
    static int64_t inputs_at_once(int64_t rows, const PackedHeader& header) {
        if (!in_parts(rows, header)) return header.inputs;
        const int64_t block = Tile::block_inputs(header.inputs), whole = block == header.inputs ? Tile::part_inputs(header.group) : block;
        const int64_t most = part_bytes / (rows_at_once(rows, header) * (int64_t)sizeof(Row));
        const int64_t parts = std::max<int64_t>((header.inputs + most - 1) / most, 2);
        return round_up((header.inputs + parts - 1) / parts, whole);
    }

    static int64_t sum_bytes(const Linear& call, const PackedHeader& header) {
        int64_t most = multiplies_matrices<Tile> ? Tile::max_rows : rows_at_once(call.rows, header);
        int64_t count = std::min(call.rows, most) * (in_parts(call.rows, header) ? panels_of_part : header.gated ? 2 : 1);
        return round_up(std::max<int64_t>(count, Tile::max_rows * (multiplies_matrices<Tile> ? 2 : 1)) * panel_outputs * (int64_t)sizeof(float), 64);
    }

    static int64_t row_elements(int64_t inputs) {
        int64_t block = Tile::block_inputs(inputs);
        return (inputs + block - 1) / block * Tile::row_block(block);
    }

    static int64_t shared_bytes(int64_t rows, int64_t inputs) {
        return round_up(rows * row_elements(inputs) * (int64_t)sizeof(Row), 64) + round_up(rows * 4, 64);
    }

    Product(const Linear& call, uint8_t* memory, float* sums)
        : call(call),
          header(*(const PackedHeader*)call.packed),
          inputs(header.inputs),
          outputs(header.gated ? header.out_features / 2 : header.out_features),
          panels((const uint8_t*)call.packed + header.panels),
          panel_bytes(header.panel_bytes),
          stride(row_elements(inputs)),
          rows((Row*)memory),
          row_scales((float*)(memory + round_up(call.rows * stride * (int64_t)sizeof(Row), 64))),
          sums(sums) {}

    // Whether x holds the rows just as they are multiplied.
    static bool takes_as_it_is(const Linear& call, const PackedHeader& header) {
        const bool same = std::is_same_v<Row, float> ? call.x_type == Type::f32 : std::is_same_v<Row, uint16_t> && call.x_type == Type::bf16;
        return same && !call.norm_weight && header.in_features == header.inputs;
    }

    template <class Out>
    void prepare(int64_t first, int64_t last, float* floats, const Out& out) {
        for (int64_t row = first; row < last; ++row) {
            prepare_row(call, row, header.in_features, inputs, rows + row * stride, floats, row_scales + row);
            out.prepared(header, floats, row_scales + row);
        }
    }

    // A unit: a panel, or a pair of gate and up, for one block of rows; block after block.
    static int64_t units(const Linear& call, const PackedHeader& header) {
        int64_t block = rows_at_once(call.rows, header);
        return (call.rows + block - 1) / block * block_units(header);
    }

    static int64_t units_at_once(const Linear& call, const PackedHeader& header) {
        const int64_t rows = call.rows;
        // Of parts as many together as leave every thread enough stretches for all to end at about the same time.
        if (in_parts(rows, header)) {
            const int64_t shared = units(call, header) / (stretches_of_parts * omp_get_max_threads());
            return std::clamp<int64_t>(shared, 1, panels_of_part / (header.gated ? 2 : 1));
        }
        int64_t weights_of_unit = header.inputs * panel_outputs * (header.gated ? 2 : 1);
        int64_t count = std::clamp<int64_t>(products_at_once / (weights_of_unit * std::clamp<int64_t>(rows, 8, row_block)), 1, 64);
        // A whole number of what few rows take at once.
        int64_t group = rows <= Tile::max_rows ? std::max(panels_at_once((int)rows) / (header.gated ? 2 : 1), 1) : 1;
        return round_up(count, group);
    }

    // Units [first, last): `out` is given the sums of each with each row.
    template <class Out>
    void run(int64_t first, int64_t last, const Out& out) {
        int64_t block = rows_at_once(call.rows, header), of_block = block_units(header);
        while (first < last) {
            int64_t row = first / of_block * block, unit = first % of_block, count = std::min(of_block - unit, last - first);
            run_block(row, std::min(call.rows, row + block), unit, unit + count, out);
            first += count;
        }
    }

    // One row's outputs of one panel before bias and all that follows, [panel_outputs].
    void values(int64_t row, int64_t panel, float* to) {
        if constexpr (multiplies_matrices<Tile>) {
            multiply_matrices(row, 1, panel, sums);
        } else {
            multiply(row, 1, 1, panel, 1, 0, inputs, panel_bytes, sums);
        }
        for (int v = 0; v < panel_vectors; ++v) Simd::store(to + v * width, value(row, panel, sums, v));
    }

    // Vector v of them, of their sums.
    F value(int64_t row, int64_t panel, const float* of, int v) const {
        const F total = Tile::total(of, after(panel), v);
        if constexpr (!std::is_same_v<Row, uint8_t>) return total;  // others' rows have no scale beside them
        return Simd::mul(total, Simd::set1(row_scales[row]));
    }

    // What follows a panel's inputs.
    const uint8_t* after(int64_t panel) const { return panels + panel * panel_bytes + Tile::panel_offset(inputs, header.group); }

private:
    static int64_t block_units(const PackedHeader& header) {
        return num_panels(header.out_features, header.gated) / (header.gated ? 2 : 1);
    }

    // The fewer the rows, the more panels at once, so that enough sums are under way and enough weights asked for.
    static constexpr int panels_at_once(int rows) {
        int fitting = Tile::max_rows / rows;
        return fitting >= 4 ? 4 : fitting >= 2 ? 2 : 1;
    }

    template <class Out>
    void run_block(int64_t row, int64_t row_end, int64_t first, int64_t last, const Out& out) {
        if constexpr (multiplies_matrices<Tile>) return run_matrices(row, row_end, first, last, out);
        int64_t per_unit = header.gated ? 2 : 1;
        int64_t panel = first * per_unit, end = last * per_unit;
        int64_t count = row_end - row, tiles = (count + Tile::max_rows - 1) / Tile::max_rows;
        const int64_t part = inputs_at_once(call.rows, header);
        int64_t at_once = tiles == 1 && part == inputs ? panels_at_once((int)count) : 1;
        while (panel < end) {
            if (panel + at_once > end) at_once = 1;
            const int64_t size = count * at_once * panel_outputs;
            const int64_t together = part < inputs ? std::min(panels_of_part, end - panel) : std::max(at_once, per_unit);
            for (int64_t k = 0; k < inputs; k += part) {
                const int64_t behind = std::min(inputs, k + part);
                for (int64_t i = 0; i < together; i += at_once) {
                    // What comes next: the next panel's part, or the first one's next.
                    const bool last = i + at_once == together && behind < inputs;
                    const int64_t back = Tile::panel_offset(behind, header.group) - Tile::panel_offset(k, header.group) - i * panel_bytes;
                    multiply(row, count, tiles, panel + i, at_once, k, behind, last ? back : panel_bytes, sums + i * size);
                }
            }
            for (int64_t i = 0; i < together; i += per_unit) {
                // Panels multiplied at once stand side by side in a row, others one after the other.
                const float* mine = sums + i * (at_once == 1 ? size : panel_outputs);
                const float* up = header.gated ? mine + (at_once == 1 ? size : panel_outputs) : nullptr;
                out.finish(*this, row, count, panel + i, mine, up, at_once * panel_outputs);
            }
            panel += together;
        }
    }

    // Panel after panel, and of each as many rows as the registers take, whose sums are still in the nearest cache when they are finished.
    template <class Out>
    void run_matrices(int64_t row, int64_t row_end, int64_t first, int64_t last, const Out& out) {
        const int64_t per_unit = header.gated ? 2 : 1, most = Tile::max_rows * panel_outputs;
        for (int64_t panel = first * per_unit; panel < last * per_unit; panel += per_unit) {
            ahead_.begin(panels + (panel + per_unit) * panel_bytes, per_unit * panel_bytes, row_end - row,
                         per_unit * Tile::steps(inputs));
            for (int64_t top = row, count; top < row_end; top += count) {
                count = Tile::rows_of_next(row_end - top);
                for (int64_t i = 0; i < per_unit; ++i) multiply_matrices(top, count, panel + i, sums + i * most);
                for (int64_t r = 0; r < count; ++r) {
                    const float* mine = sums + r * panel_outputs;
                    out.finish(*this, top + r, 1, panel, mine, header.gated ? mine + most : nullptr, 0);
                    ahead_.finish();
                }
            }
        }
    }

    void multiply_matrices(int64_t row, int64_t count, int64_t panel, float* to) {
        Tile::multiply(shape_, ahead_, count, rows + row * stride, stride, panels + panel * panel_bytes, inputs, to);
    }

    // Inputs [first, last), whose sums are added to those of the inputs before. Blocks of inputs outermost, so that their weights are in the
    // nearest cache for all rows but the first. `next`: how far behind these weights those lie that are multiplied next.
    void multiply(int64_t row, int64_t count, int64_t tiles, int64_t panel, int64_t at_once, int64_t first, int64_t last, int64_t next,
                  float* to) {
        const int64_t block = Tile::block_inputs(inputs);
        for (int64_t k = first; k < last; k += block) {
            const Row* a = rows + row * stride + Tile::row_offset(k, inputs);
            const uint8_t* w = panels + panel * panel_bytes + Tile::panel_offset(k, header.group);
            const int64_t size = std::min(block, last - k);
            if (tiles == 1) {
                alone<1>((int)count, at_once, a, w, size, {w + (Simd::bytes_ahead ? Simd::bytes_ahead : next), 64, nullptr}, k > 0, to);
                continue;
            }
            const int64_t share = (size == inputs ? panel_bytes : Tile::panel_offset(size, header.group)) / tiles;
            const Asks asks = tiles == 2 && Tile::waits_for_memory ? Asks::far : Asks::near;
            // Tiles of nearly equal height: none so low that its few sums wait for each other.
            for (int64_t i = 0; i < tiles; ++i) {
                const int64_t top = count * i / tiles, height = count * (i + 1) / tiles - top;
                const auto add = [&](auto tile, const uint8_t* of, int64_t asked) SLUICE_HERE {
                    const Ahead ahead{w + next + share * i, asked / tiles, room_.kept()};
                    one_of_several<1>(tile, (int)height, asks, a + top * stride, of, size, ahead, k > 0, to + top * panel_outputs);
                };
                if (i == 0 || std::is_same_v<NextTile, Tile>) add(Tile(), w, 128);
                else add(NextTile(), room_.kept(), Room::asked);
            }
        }
    }

    template <int R>
    void alone(int height, int64_t at_once, const Row* a, const uint8_t* w, int64_t size, Ahead ahead, bool goes_on, float* to) {
        if constexpr (R <= Tile::max_rows) {
            if (height != R) return alone<R + 1>(height, at_once, a, w, size, ahead, goes_on, to);
            if (at_once > 1) return add_tile<Tile, R, panels_at_once(R), Asks::alone>(a, w, size, ahead, goes_on, to);
            add_tile<Tile, R, 1, Asks::alone>(a, w, size, ahead, goes_on, to);
        }
    }

    template <int R, class T>
    void one_of_several(T tile, int height, Asks asks, const Row* a, const uint8_t* w, int64_t size, Ahead ahead, bool goes_on, float* to) {
        if constexpr (R <= Tile::max_rows) {
            if (height != R) return one_of_several<R + 1>(tile, height, asks, a, w, size, ahead, goes_on, to);
            if constexpr (2 * R >= Tile::max_rows) {  // of nearly equal ones, none is lower
                if (!Tile::waits_for_memory || asks == Asks::near) return add_tile<T, R, 1, Asks::near>(a, w, size, ahead, goes_on, to);
                if constexpr (Tile::waits_for_memory) add_tile<T, R, 1, Asks::far>(a, w, size, ahead, goes_on, to);
            }
        }
    }

    // Not inlined: among other tiles, its sums would not be given registers.
    template <class T, int R, int C, Asks asks>
    [[gnu::noinline]] void add_tile(const Row* a, const uint8_t* w, int64_t size, Ahead ahead, bool goes_on, float* to) {
        T::template add<R, C, asks>(a, stride, w, panel_bytes, size, header.group, ahead, goes_on, to);
    }

    [[no_unique_address]] Room room_;
    [[no_unique_address]] RowShape shape_;
    [[no_unique_address]] WeightsAhead ahead_;
};

// Where a linear's sums go: into its outputs.
struct Outputs {
    const Linear& call;

    void prepared(const PackedHeader&, const float*, float*) const {}

    // Sums of `count` rows, `stride` apart, and the unit that begins with `panel`; `up`: null where it is the whole unit.
    template <class Tile>
    void finish(const Product<Tile>& product, int64_t row, int64_t count, int64_t panel, const float* gate, const float* up,
                int64_t stride) const {
        if (up) finish_as<true>(product, row, count, panel, gate, up, stride);
        else finish_as<false>(product, row, count, panel, gate, up, stride);
    }

private:
    template <bool gated, class Tile>
    void finish_as(const Product<Tile>& product, int64_t row, int64_t count, int64_t panel, const float* gate, const float* up,
                   int64_t stride) const {
        const int64_t outputs = product.outputs, first = (gated ? panel / 2 : panel) * panel_outputs;
        const auto each_row = [&](auto finish_row) SLUICE_HERE {
            for (int64_t r = 0; r < count; ++r) finish_row(row + r, gate + r * stride, gated ? up + r * stride : nullptr);
        };
        if (first + panel_outputs > outputs) {
            return each_row([&](int64_t at, const float* of_gate, const float* of_up) {
                for (int v = 0; v < panel_vectors && first + v * width < outputs; ++v) {
                    const int64_t output = first + v * width;
                    finish_vector<gated>(product, at, panel, of_gate, of_up, v, output, lanes_left(output, outputs), call.out_type);
                }
            });
        }
        const auto whole = [&](auto out_type) SLUICE_HERE {
            each_row([&](int64_t at, const float* of_gate, const float* of_up) SLUICE_HERE {
                each<panel_vectors>([&](auto v) SLUICE_HERE {
                    finish_vector<gated>(product, at, panel, of_gate, of_up, v, first + v * width, width, out_type);
                });
            });
        };
        if (call.out_type == Type::f32) whole(std::integral_constant<Type, Type::f32>());
        else whole(std::integral_constant<Type, Type::bf16>());
    }

    template <bool gated, class Tile>
    SLUICE_INLINE void finish_vector(const Product<Tile>& product, int64_t row, int64_t panel, const float* gate, const float* up, int v,
                                     int64_t output, int n, Type out_type) const {
        F x = with_bias(product.value(row, panel, gate, v), output, n);
        if (gated) {
            const F other = with_bias(product.value(row, panel + 1, up, v), product.outputs + output, n);
            x = Simd::mul(silu<!std::is_same_v<Tile, FloatTile>>(x), other);
        }
        const int64_t place = row * product.outputs + output;
        if (call.residual) x = Simd::add(x, load_typed(call.residual, place, n, call.type));
        store_typed(call.out, place, x, n, out_type);
    }
    F with_bias(F x, int64_t output, int n) const { return call.bias ? Simd::add(x, load_typed(call.bias, output, n, call.type)) : x; }
};

// The whole product; `out.prepared` hears of each row's floats, which rows in bf16 do not have, and may set its scale; `out.finish` of each
// unit's sums.
template <class Tile, class Out>
inline void run_product(const Linear& call, const Out& out) {
    using Parts = Product<Tile>;
    const PackedHeader& header = *(const PackedHeader*)call.packed;
    int64_t bytes = Parts::shared_bytes(call.rows, header.inputs), float_bytes = round_up(header.inputs * 4, 64);
    int64_t sum_bytes = Parts::sum_bytes(call, header);
    bool as_it_is = Parts::takes_as_it_is(call, header), apart = !as_it_is && call.rows <= rows_prepared_apart;
    uint8_t* shared = as_it_is ? (uint8_t*)call.x : apart ? nullptr : scratch(0, bytes);
    if (!as_it_is && !apart) {
        sluice::parallel(call.rows, std::max<int64_t>(inputs_prepared_at_once / header.inputs, 1), [&](sluice::Share& share) {
            uint8_t* own = scratch(1, float_bytes);
            Parts parts(call, shared, nullptr);
            for (int64_t first, last; share.take(first, last);) parts.prepare(first, last, (float*)own, out);
        });
    }
    int64_t at_once = Parts::units_at_once(call, header);
    sluice::parallel(Parts::units(call, header), at_once, [&](sluice::Share& share) {
        uint8_t* own = scratch(1, float_bytes + sum_bytes + (apart ? bytes : 0));
        Parts parts(call, apart ? own + float_bytes + sum_bytes : shared, (float*)(own + float_bytes));
        if (apart) parts.prepare(0, call.rows, (float*)own, out);
        for (int64_t first, last; share.take(first, last);) parts.run(first, last, out);
    });
}

// body(Tile()) with the tile of the weight's format.
template <class Body>
inline void with_tile(const void* packed, const Body& body) {
    switch (((const PackedHeader*)packed)->format) {
        case Format::f32: return body(FloatTile());
        case Format::bf16: return body(Bf16Matrix());
        case Format::fixed: return body(FixedTile());
        case Format::narrow:
            if constexpr (Simd::narrow) body(NarrowTile());  // elsewhere nothing is packed so
            return;
        case Format::int8: return body(Int8Matrix());
        case Format::int4: return body(Int4Tile());
        case Format::coarse: return;  // stands for no weight of its own
    }
}

inline void linear(const Linear& call) {
    if (call.rows == 0) return;
    with_tile(call.packed, [&](auto tile) { run_product<decltype(tile)>(call, Outputs{call}); });
}

}  // namespace SLUICE_ISA
