// RMSNorm on its own (Zhang and Sennrich 2019): heads of a model that norms them, rows before a part that is no packed linear.
#pragma once

namespace SLUICE_ISA {

inline void rms_norm_rows(const void* x, const void* weight, float eps, int64_t rows, int64_t size, Type type, void* out) {
    sluice::parallel_for(rows, 16384 / std::clamp<int64_t>(size, 1, 16384), [&](int64_t row) {
        int64_t start = row * size;
        F scale = Simd::set1(rms_scale(x, start, size, eps, type));
        for (int64_t i = 0; i < size; i += width) {
            int n = lanes_left(i, size);
            F normed = Simd::mul(load_typed(x, start + i, n, type), scale);
            store_typed(out, start + i, Simd::mul(normed, load_typed(weight, i, n, type)), n, type);
        }
    });
}

}  // namespace SLUICE_ISA
