// The two products of attention_tiles.h where the processor multiplies matrices (AMX): up to 16 rows by a line at a time.
//
// Registers 0 to 3: sums of the rows, a line each; 4 and 5: rows and cache, 32 numbers along the summed dimension; 6 and 7: the same of 16.
#pragma once

namespace SLUICE_ISA {

// A line of values that may all be multiplied: [line_lanes / 2][dim][2].
struct ValueLine {
    const uint16_t* values;
    int64_t first;  // its first token
    int64_t ahead;  // bytes from a value to what is to be asked for meanwhile
};

#ifdef SLUICE_AMX

constexpr int lines_at_once = 4;

inline void shape_rows(RowShape& shape, int64_t rows) {
    shape.set(rows, [rows](int t) {
        return std::pair(t == 6 ? amx::row_bytes / 2 : amx::row_bytes, t == 5 ? amx::tile_rows : t == 7 ? amx::tile_rows / 2 : rows);
    });
}

// scores[r][token] = q[r] . k[token] for `L` lines of tokens; arguments as score_tile's.
template <int L>
inline void score_matrix(const uint16_t* q, int64_t q_stride, const uint16_t* const* k, int64_t k_stride, int64_t dim,
                         const char* const* ahead, float* scores, int64_t scores_stride) {
    each<L>([&](auto l) SLUICE_HERE { amx::zero<l>(); });
    for (int64_t d = 0; d < dim; d += 32) {
        const int64_t place = d / 2 * k_stride;
        each<L>([&](auto l) SLUICE_HERE {
            for (int64_t b = 0; b < 1024; b += 64) __builtin_prefetch(ahead[l] + 32 * d + b);
        });
        if (d + 32 <= dim) {
            amx::load<4>(q + d, 2 * q_stride);
            each<L>([&](auto l) SLUICE_HERE {
                amx::load<5>(k[l] + place, 2 * k_stride);
                amx::add_bf16_products<l, 4, 5>();
            });
        } else {
            amx::load<6>(q + d, 2 * q_stride);
            each<L>([&](auto l) SLUICE_HERE {
                amx::load<7>(k[l] + place, 2 * k_stride);
                amx::add_bf16_products<l, 6, 7>();
            });
        }
    }
    each<L>([&](auto l) SLUICE_HERE { amx::store<l>(scores + l * line_lanes, 4 * scores_stride); });
}

// out[r][d] += weights[r][token] * v[token][d], line after line of tokens, for `L` lines of dimensions from `offset` on.
template <int L>
inline void value_matrix(const uint16_t* weights, int64_t weights_stride, const ValueLine* lines, int count, int64_t offset, int64_t dim,
                         bool from_zero, float* out, int64_t out_stride) {
    each<L>([&](auto l) SLUICE_HERE {
        if (from_zero) amx::zero<l>();
        else amx::load<l>(out + offset + l * line_lanes, 4 * out_stride);
    });
    for (int i = 0; i < count; ++i) {
        const uint16_t* v = lines[i].values + 2 * offset;
        amx::load<6>(weights + lines[i].first, 2 * weights_stride);
        each<L>([&](auto l) SLUICE_HERE {
            for (int pair = 0; pair < line_lanes / 2; ++pair) {
                __builtin_prefetch((const char*)(v + pair * 2 * dim + l * 2 * line_lanes) + lines[i].ahead);
            }
            amx::load<7>(v + l * 2 * line_lanes, 4 * dim);
            amx::add_bf16_products<l, 6, 7>();
        });
    }
    each<L>([&](auto l) SLUICE_HERE { amx::store<l>(out + offset + l * line_lanes, 4 * out_stride); });
}

// body(L, first) over `count` lines, L of them at once.
template <class Body>
inline void each_lines(int count, const Body& body) {
    int line = 0;
    for (; line + lines_at_once <= count; line += lines_at_once) body(std::integral_constant<int, lines_at_once>{}, line);
    if (count - line >= 2) {
        body(std::integral_constant<int, 2>{}, line);
        line += 2;
    }
    if (line < count) body(std::integral_constant<int, 1>{}, line);
}

#else

inline void shape_rows(RowShape&, int64_t) {}

#endif

}  // namespace SLUICE_ISA
