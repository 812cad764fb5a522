// Rows of a table by id, widened to floats.
#pragma once

namespace SLUICE_ISA {

inline void embedding_rows(const void* table, const int64_t* ids, int64_t rows, int64_t size, Type type, float* out) {
    sluice::parallel_for(rows, 8192 / std::clamp<int64_t>(size, 1, 8192), [&](int64_t row) {
        for (int64_t i = 0; i < size; i += width) {
            const int n = lanes_left(i, size);
            store_typed(out, row * size + i, load_typed(table, ids[row] * size + i, n, type), n, Type::f32);
        }
    });
}

}  // namespace SLUICE_ISA
