// Rows of a table by id.
#pragma once

namespace SLUICE_ISA {

inline void embedding_rows(const void* table, const int64_t* ids, int64_t rows, int64_t size, Type type, void* out) {
    int64_t bytes = size * (type == Type::bf16 ? 2 : 4);
#pragma omp parallel for schedule(static) if (rows * bytes > 65536)
    for (int64_t row = 0; row < rows; ++row) {
        std::memcpy((uint8_t*)out + row * bytes, (const uint8_t*)table + ids[row] * bytes, (size_t)bytes);
    }
}

}  // namespace SLUICE_ISA
