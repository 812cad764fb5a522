// Memory for packed weights: pieces lie one after another, in the order asked for, in huge pages where the system gives them.
#pragma once

#include <ATen/ATen.h>

namespace sluice {

// `bytes` of memory, 64-byte aligned, as a byte tensor; its contents are not defined. Thread-safe. Throws c10::Error when it cannot be had.
at::Tensor weight_memory(int64_t bytes);

}  // namespace sluice
