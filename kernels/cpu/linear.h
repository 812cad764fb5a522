// A packed linear layer for every number of rows: norm before, bias, SiLU(gate)·up and residual after, rounded once.
//
// One OpenMP region a call. Each thread takes a run of panels, so that it streams its own part of the weights; few rows are prepared by
// every thread for itself, which is cheaper than a barrier. Many rows are walked in blocks that stay in a core's cache.
#pragma once

namespace SLUICE_ISA {

constexpr int64_t rows_prepared_apart = 2;
constexpr int64_t row_block_bytes = 192 << 10;

// As much as is asked for and no more, where a sanitizer watches what lies behind.
#ifdef __SANITIZE_ADDRESS__
constexpr bool exact_scratch = true;
#else
constexpr bool exact_scratch = false;
#endif

// Memory that a thread keeps between calls.
inline uint8_t* scratch(int which, int64_t bytes) {
    struct Buffer {
        void* data = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer kept[2];
    Buffer& buffer = kept[which];
    if (buffer.size < bytes || (exact_scratch && buffer.size != bytes)) {
        std::free(buffer.data);
        buffer.size = exact_scratch ? bytes : round_up(bytes + bytes / 2, 4096);
        if (posix_memalign(&buffer.data, 64, (size_t)buffer.size)) std::abort();
    }
    return (uint8_t*)buffer.data;
}

// What a linear of one format knows of itself while it runs.
template <class Tile>
struct Product {
    using Row = typename Tile::Row;

    const Linear& call;
    const PackedHeader& header;
    int64_t inputs;
    int64_t outputs;
    const uint8_t* panels;
    Row* rows;        // [call.rows, inputs]
    float* row_scales;

    static int64_t shared_bytes(int64_t rows, int64_t inputs) {
        return round_up(rows * inputs * (int64_t)sizeof(Row), 64) + round_up(rows * 4, 64);
    }

    Product(const Linear& call, uint8_t* memory)
        : call(call),
          header(*(const PackedHeader*)call.packed),
          inputs(header.inputs),
          outputs(header.gated ? header.out_features / 2 : header.out_features),
          panels((const uint8_t*)call.packed + header.panels),
          rows((Row*)memory),
          row_scales((float*)(memory + round_up(call.rows * inputs * (int64_t)sizeof(Row), 64))) {}

    void prepare(int64_t first, int64_t last, float* floats) {
        for (int64_t row = first; row < last; ++row) {
            prepare_row(call, row, header.in_features, inputs, rows + row * inputs, floats, row_scales + row);
        }
    }

    // Units [first, last): panels, or pairs of gate and up.
    void run(int64_t first, int64_t last) {
        int64_t block = std::max<int64_t>(row_block_bytes / (inputs * (int64_t)sizeof(Row)), Tile::max_rows);
        block = block / Tile::max_rows * Tile::max_rows;
        for (int64_t row = 0; row < call.rows; row += block) {
            run_block(row, std::min(call.rows, row + block), first, last);
        }
    }

private:
    // The fewer the rows, the more panels at once, so that enough sums are under way and enough weights asked for.
    static constexpr int panels_at_once(int rows) {
        int fitting = Tile::max_rows / rows;
        return fitting >= 4 ? 4 : fitting >= 2 ? 2 : 1;
    }

    void run_block(int64_t row, int64_t row_end, int64_t first, int64_t last) {
        int64_t per_unit = header.gated ? 2 : 1;
        int64_t panel = first * per_unit, end = last * per_unit;
        int64_t count = row_end - row, tiles = (count + Tile::max_rows - 1) / Tile::max_rows;
        int64_t at_once = tiles == 1 ? panels_at_once((int)count) : 1;
        while (panel < end) {
            if (panel + at_once > end) at_once = 1;
            // Tiles of nearly equal height: none so low that its few sums wait for each other.
            for (int64_t i = 0; i < tiles; ++i) {
                int64_t top = row + count * i / tiles, bottom = row + count * (i + 1) / tiles;
                int64_t share = header.panel_bytes / tiles;
                Ahead ahead{panels + (panel + per_unit) * header.panel_bytes + share * i, 64 / tiles};
                run_tile<1>((int)(bottom - top), top, panel, at_once, ahead);
            }
            panel += std::max(at_once, per_unit);
        }
    }

    template <int R>
    void run_tile(int rows, int64_t row, int64_t panel, int64_t at_once, Ahead ahead) {
        if constexpr (R <= Tile::max_rows) {
            if (rows != R) return run_tile<R + 1>(rows, row, panel, at_once, ahead);
            if (at_once == 1) tile<R, 1>(row, panel, ahead);
            else tile<R, panels_at_once(R)>(row, panel, ahead);
        }
    }

    // Not inlined: among other tiles, its sums would not be given registers.
    template <int R, int C>
    [[gnu::noinline]] void tile(int64_t row, int64_t panel, Ahead ahead) {
        constexpr int runs = C == 1 ? 2 : 1;  // a gated layer's panel of gate, then its panel of up
        float sums[runs][R * C * panel_outputs];
        const Row* a = rows + row * inputs;
        const uint8_t* w = panels + panel * header.panel_bytes;
        for (int i = 0; i < (header.gated ? runs : 1); ++i) {
            Tile::template run<R, C>(a, inputs, w + i * header.panel_bytes, header.panel_bytes, inputs, header.group, ahead, sums[i]);
            ahead.at += header.panel_bytes;
        }
        for (int r = 0; r < R; ++r) {
            const float* mine = sums[0] + r * C * panel_outputs;
            if (!header.gated) {
                for (int c = 0; c < C; ++c) finish(row + r, panel + c, mine + c * panel_outputs, nullptr);
            } else if (C == 1) {
                finish(row + r, panel / 2, mine, sums[runs - 1] + r * panel_outputs);
            } else {
                for (int c = 0; c < C; c += 2) finish(row + r, (panel + c) / 2, mine + c * panel_outputs, mine + (c + 1) * panel_outputs);
            }
        }
    }

    // Sums of one row and one unit to outputs.
    void finish(int64_t row, int64_t unit, const float* sums, const float* up) {
        F scale = Simd::set1(row_scales[row]);
        int64_t first = unit * panel_outputs;
        for (int v = 0; v < panel_vectors; ++v) {
            int64_t output = first + v * width;
            if (output >= outputs) return;
            int n = lanes_left(output, outputs);
            F x = with_bias(Simd::mul(Simd::load(sums + v * width), scale), output, n);
            if (up) x = Simd::mul(silu(x), with_bias(Simd::mul(Simd::load(up + v * width), scale), outputs + output, n));
            int64_t place = row * outputs + output;
            if (call.residual) x = Simd::add(x, load_typed(call.residual, place, n, call.type));
            store_typed(call.out, place, x, n, call.out_type);
        }
    }

    F with_bias(F x, int64_t output, int n) { return call.bias ? Simd::add(x, load_typed(call.bias, output, n, call.type)) : x; }
};

template <class Tile>
inline void run_linear(const Linear& call) {
    using Parts = Product<Tile>;
    const PackedHeader& header = *(const PackedHeader*)call.packed;
    int64_t units = num_panels(header.out_features, header.gated) / (header.gated ? 2 : 1);
    int64_t bytes = Parts::shared_bytes(call.rows, header.inputs), float_bytes = round_up(header.inputs * 4, 64);
    bool apart = call.rows <= rows_prepared_apart;
    uint8_t* shared = apart ? nullptr : scratch(0, bytes);
#pragma omp parallel
    {
        int64_t threads = omp_get_num_threads(), mine = omp_get_thread_num();
        uint8_t* own = scratch(1, float_bytes + (apart ? bytes : 0));
        Parts parts(call, apart ? own + float_bytes : shared);
        if (apart) {
            parts.prepare(0, call.rows, (float*)own);
        } else {
            parts.prepare(call.rows * mine / threads, call.rows * (mine + 1) / threads, (float*)own);
#pragma omp barrier
        }
        parts.run(units * mine / threads, units * (mine + 1) / threads);
    }
}

inline void linear(const Linear& call) {
    if (call.rows == 0) return;
    switch (((const PackedHeader*)call.packed)->format) {
        case Format::f32: return run_linear<FloatTile>(call);
        case Format::bf16: return run_linear<Bf16Tile>(call);
        case Format::int8: return run_linear<Int8Tile>(call);
        case Format::int4: return run_linear<Int4Tile>(call);
    }
}

}  // namespace SLUICE_ISA
