// Memory in huge pages where the system gives them, for what a step reads much of: weights, keys and values.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace sluice {

// `bytes` of memory, 64-byte aligned, as a byte tensor of what `fill` says it takes of them. Pieces lie one after another, in the order asked
// for. Thread-safe. Throws c10::Error when it cannot be had.
at::Tensor weight_memory(int64_t bytes, const std::function<int64_t(void* memory)>& fill);

// `bytes` of zeros in a mapping of their own, taken from the system when they are first written. Throws c10::Error when they cannot be had.
at::Tensor zeroed_memory(int64_t bytes);

// Takes bytes [first, last) of each of `tensors` of zeroed_memory from the system, page after page of all, in a thread of its own, as far as
// they reach and as long as they are there. `first` is a whole number of pages of 2 MiB. Elsewhere than on Linux from 5.14 it does nothing.
void take_ahead(at::TensorList tensors, int64_t first, int64_t last);

}  // namespace sluice
