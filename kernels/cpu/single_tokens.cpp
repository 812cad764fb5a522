// torch.ops.sluice_cpu.single_tokens: the flat batch of a step of single tokens, from what the host remembers of each slot.
//
// One call in place of two dozen of Python's, which find the caches emptied by the step before.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace {

using at::Tensor;

constexpr int64_t columns = 3;  // of a chunk: slot, position, whether its token is still to be drawn

template <class Number>
const Number* checked_table(const Tensor& x, const char* name, at::ScalarType type) {
    TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == type && x.dim() == 2 && x.is_contiguous(), name, " must be a contiguous table of ",
                type);
    return (const Number*)x.const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> single_tokens(const Tensor& tokens, const Tensor& blocks,
                                                                                const Tensor& chunks, int64_t block_size) {
    const int64_t* known = checked_table<int64_t>(tokens, "tokens", at::kLong);
    const int32_t* held = checked_table<int32_t>(blocks, "blocks", at::kInt);
    const int64_t* chunk = checked_table<int64_t>(chunks, "chunks", at::kLong);
    const int64_t count = chunks.size(0), width = blocks.size(1);
    TORCH_CHECK(chunks.size(1) == columns && tokens.size(0) == blocks.size(0) && block_size > 0, "chunks must be [n, ", columns,
                "], tokens and blocks of as many slots");
    int64_t longest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t slot = chunk[i * columns], position = chunk[i * columns + 1];
        TORCH_CHECK(slot >= 0 && slot < tokens.size(0) && position >= 0 && position < tokens.size(1) && position / block_size < width, "slot ",
                    slot, " has no position ", position);
        longest = std::max(longest, position + 1);
    }
    const int64_t used = (longest + block_size - 1) / block_size;
    const auto whole = at::TensorOptions(at::kLong), half = at::TensorOptions(at::kInt);
    Tensor ids = at::empty({count}, whole), positions = at::empty({count}, whole), slots = at::empty({count}, whole);
    Tensor starts = at::empty({count + 1}, half), lens = at::empty({count}, half), tables = at::empty({count, used}, half);
    Tensor mapping = at::empty({count}, whole);
    starts.data_ptr<int32_t>()[count] = (int32_t)count;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t slot = chunk[i * columns], position = chunk[i * columns + 1];
        const int32_t* mine = held + slot * width;
        ids.data_ptr<int64_t>()[i] = chunk[i * columns + 2] ? -1 : known[slot * tokens.size(1) + position];
        positions.data_ptr<int64_t>()[i] = position;
        slots.data_ptr<int64_t>()[i] = slot;
        starts.data_ptr<int32_t>()[i] = (int32_t)i;
        lens.data_ptr<int32_t>()[i] = (int32_t)(position + 1);
        std::copy(mine, mine + used, tables.data_ptr<int32_t>() + i * used);
        mapping.data_ptr<int64_t>()[i] = mine[position / block_size] * block_size + position % block_size;
    }
    return {ids, positions, slots, starts, lens, tables, mapping};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sluice_cpu, library) {
    library.def(
        "single_tokens(Tensor tokens, Tensor blocks, Tensor chunks, int block_size) -> "
        "(Tensor ids, Tensor positions, Tensor slots, Tensor starts, Tensor lens, Tensor tables, Tensor mapping)");
}

TORCH_LIBRARY_IMPL(sluice_cpu, CPU, library) { library.impl("single_tokens", single_tokens); }
