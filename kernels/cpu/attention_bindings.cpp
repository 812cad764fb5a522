// torch.ops.sluice_cpu.attention and attention_plan: checks everything that an address is made of, then calls the table in use.
#include <ATen/core/Tensor.h>
#include <omp.h>
#include <torch/library.h>

#include "attention_plan.h"
#include "dispatch.h"
#include "memory.h"
#include "prepared_calls.h"

namespace {

using at::Tensor;
using sluice::Attention;
using sluice::AttentionItem;
using sluice::Type;

constexpr int64_t item_numbers = sizeof(AttentionItem) / sizeof(int32_t);

// Row 0 of a plan: what it was made for, and what its items need.
struct PlanHeader {
    int32_t units;
    int32_t partial_rows;
    int32_t q_heads;
    int32_t kv_heads;
    int32_t window;
    int32_t num_seqs;
    uint32_t lengths;  // a fingerprint
    int32_t reserved[5];
};
static_assert(sizeof(PlanHeader) == sizeof(AttentionItem));

template <class Number>
const Number* checked_ints(const Tensor& x, const char* name, int64_t size, at::ScalarType type) {
    TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == type && x.is_contiguous(), name, " must be a contiguous CPU tensor of ", type);
    TORCH_CHECK(x.dim() == 1 && x.size(0) == size, name, " must be [", size, "]");
    return (const Number*)x.const_data_ptr();
}

// Chunks lie one after another in [0, tokens], each within its context. Gives their fingerprint.
uint32_t checked_lengths(const int32_t* starts, const int32_t* seq_lens, int64_t num_seqs, int64_t tokens) {
    TORCH_CHECK(starts[0] == 0 && (tokens < 0 || starts[num_seqs] == tokens), "query_start_loc must run from 0 to the number of tokens");
    uint32_t fingerprint = 2166136261u;
    for (int64_t seq = 0; seq < num_seqs; ++seq) {
        const int32_t rows = starts[seq + 1] - starts[seq];
        TORCH_CHECK(rows >= 0 && rows <= seq_lens[seq], "sequence ", seq, " has a chunk of ", rows, " tokens in a context of ", seq_lens[seq]);
        fingerprint = ((fingerprint ^ (uint32_t)rows) * 16777619u ^ (uint32_t)seq_lens[seq]) * 16777619u;
    }
    return fingerprint;
}

Tensor attention_plan(const Tensor& query_start_loc, const Tensor& seq_lens, int64_t q_heads, int64_t kv_heads, int64_t window) {
    TORCH_CHECK(kv_heads > 0 && q_heads > 0 && q_heads % kv_heads == 0, "q_heads must be a multiple of kv_heads");
    TORCH_CHECK(window >= 0, "sliding_window must not be negative");
    const int64_t num_seqs = seq_lens.numel();
    const int32_t* lens = checked_ints<int32_t>(seq_lens, "seq_lens", num_seqs, at::kInt);
    const int32_t* starts = checked_ints<int32_t>(query_start_loc, "query_start_loc", num_seqs + 1, at::kInt);
    const uint32_t lengths = checked_lengths(starts, lens, num_seqs, -1);
    const sluice::AttentionPlan plan =
        sluice::AttentionPlanner(starts, lens, num_seqs, q_heads, kv_heads, window).plan(omp_get_max_threads());
    Tensor out = at::empty({(int64_t)plan.items.size() + 1, item_numbers}, at::kInt);
    auto* rows = (AttentionItem*)out.data_ptr();
    *(PlanHeader*)rows = {plan.units, plan.partial_rows, (int32_t)q_heads, (int32_t)kv_heads, (int32_t)window, (int32_t)num_seqs, lengths, {}};
    std::copy(plan.items.begin(), plan.items.end(), rows + 1);
    return out;
}

// Heads of one row of a possibly wider tensor: [tokens, heads, dim], a head contiguous.
const void* checked_heads(const Tensor& x, const char* name, int64_t tokens, int64_t heads, int64_t dim, at::ScalarType type) {
    TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == type, name, " must be on the CPU and of ", type, ", as q is");
    TORCH_CHECK(x.dim() == 3 && x.size(0) == tokens && x.size(1) == heads && x.size(2) == dim, name, " must be [", tokens, ", ", heads,
                ", ", dim, "]");
    TORCH_CHECK(tokens == 0 || (x.stride(2) == 1 && (heads == 1 || x.stride(1) == dim)), name, "'s heads must lie side by side");
    return x.const_data_ptr();
}

// Each block one stretch of memory.
bool lies_in_order(const Tensor& cache) {
    int64_t stride = 1;
    for (int64_t i = cache.dim() - 1; i > 0; stride *= cache.size(i--)) {
        if (cache.stride(i) != stride) return false;
    }
    return true;
}

void check_places(const Attention& call, int64_t num_seqs, int64_t num_blocks, int64_t max_positions) {
    for (int64_t token = 0; token < call.tokens; ++token) {
        TORCH_CHECK(call.positions[token] >= 0 && call.positions[token] < max_positions, "position ", call.positions[token],
                    " is outside cos_sin");
        TORCH_CHECK(call.slots[token] >= -1 && call.slots[token] < num_blocks * call.block_size, "slot ", call.slots[token],
                    " is outside the cache");
    }
    for (int64_t seq = 0; seq < num_seqs; ++seq) {
        const int64_t blocks = call.starts[seq + 1] > call.starts[seq] ? sluice::divide_up(call.seq_lens[seq], call.block_size) : 0;
        TORCH_CHECK(blocks <= call.table_stride, "sequence ", seq, " needs ", blocks, " blocks, its table has ", call.table_stride);
        uint32_t largest = 0;
        for (int64_t i = 0; i < blocks; ++i) largest = std::max(largest, (uint32_t)call.tables[seq * call.table_stride + i]);
        TORCH_CHECK(blocks == 0 || largest < (uint64_t)num_blocks, "sequence ", seq, " names a block outside the cache");
    }
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin, const Tensor& positions, const Tensor& k_cache,
                 const Tensor& v_cache, const Tensor& block_tables, const Tensor& seq_lens, const Tensor& query_start_loc,
                 const Tensor& slot_mapping, const Tensor& plan, double scale, int64_t window,
                 std::optional<at::ScalarType> out_dtype) {
    const at::ScalarType type = k_cache.scalar_type();
    const bool scaled = type == at::kChar;
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || scaled, "the caches must be float32, bfloat16 or int8, not ", type);
    TORCH_CHECK(k_cache.dim() == 5 && v_cache.dim() == 5 && v_cache.scalar_type() == type, "the caches must be [blocks, heads, ...], of one dtype");
    const int64_t pair = type == at::kFloat ? 1 : 2, num_blocks = k_cache.size(0), kv_heads = k_cache.size(1);
    const int64_t dim = (k_cache.size(2) - (scaled ? 2 : 0)) * pair, block_size = k_cache.size(3);
    const int64_t block_numbers = kv_heads * k_cache.size(2) * pair * block_size;
    TORCH_CHECK(dim % 16 == 0 && dim <= sluice::max_head_dim && dim > 0, "a head must have a multiple of 16 numbers, at most 256, not ", dim);
    TORCH_CHECK(block_size % 16 == 0 && block_size > 0, "a block must have a multiple of 16 tokens, not ", block_size);
    TORCH_CHECK(k_cache.size(4) == pair && v_cache.size(1) == kv_heads && v_cache.size(2) == block_size / pair && v_cache.size(3) == dim &&
                    v_cache.size(4) == pair && v_cache.size(0) == num_blocks && v_cache.stride(0) == k_cache.stride(0) &&
                    k_cache.stride(0) >= block_numbers && lies_in_order(k_cache) && lies_in_order(v_cache),
                "the caches must lie as attention_heads.h says");
    const int64_t tokens = q.dim() == 3 ? q.size(0) : -1, q_heads = q.dim() == 3 ? q.size(1) : 0, num_seqs = seq_lens.numel();
    TORCH_CHECK(cos_sin.device().is_cpu() && cos_sin.scalar_type() == at::kFloat && cos_sin.is_contiguous() && cos_sin.dim() == 2 &&
                    cos_sin.size(1) == dim,
                "cos_sin must be [max_positions, ", dim, "] of float32");
    TORCH_CHECK(block_tables.device().is_cpu() && block_tables.scalar_type() == at::kInt && block_tables.is_contiguous() &&
                    block_tables.dim() == 2 && block_tables.size(0) == num_seqs,
                "block_tables must be [", num_seqs, ", max_blocks] of int32");
    TORCH_CHECK(plan.scalar_type() == at::kInt && plan.is_contiguous() && plan.dim() == 2 && plan.size(0) > 0 && plan.size(1) == item_numbers,
                "plan must be what attention_plan made");
    const auto* header = (const PlanHeader*)plan.const_data_ptr();

    Attention call{};
    const at::ScalarType rows = q.scalar_type();
    const at::ScalarType narrow = scaled ? at::kBFloat16 : type;
    TORCH_CHECK(rows == narrow || rows == at::kFloat, "q must be of ", narrow, " or float32 beside caches of ", type, ", not ", rows);
    call.type = scaled ? Type::int8 : pair == 1 ? Type::f32 : Type::bf16;
    call.rows = rows == at::kFloat ? Type::f32 : Type::bf16;
    call.q = checked_heads(q, "q", tokens, q_heads, dim, rows);
    call.k = checked_heads(k, "k", tokens, kv_heads, dim, rows);
    call.v = checked_heads(v, "v", tokens, kv_heads, dim, rows);
    call.q_stride = q.stride(0);
    call.k_stride = k.stride(0);
    call.v_stride = v.stride(0);
    call.tokens = tokens;
    call.q_heads = q_heads;
    call.kv_heads = kv_heads;
    call.dim = dim;
    call.cos_sin = (const float*)cos_sin.const_data_ptr();
    call.positions = checked_ints<int64_t>(positions, "positions", tokens, at::kLong);
    call.slots = checked_ints<int64_t>(slot_mapping, "slot_mapping", tokens, at::kLong);
    call.k_cache = k_cache.data_ptr();
    call.v_cache = v_cache.data_ptr();
    call.block_stride = k_cache.stride(0);
    call.block_size = block_size;
    call.tables = (const int32_t*)block_tables.const_data_ptr();
    call.table_stride = block_tables.size(1);
    call.seq_lens = checked_ints<int32_t>(seq_lens, "seq_lens", num_seqs, at::kInt);
    call.starts = checked_ints<int32_t>(query_start_loc, "query_start_loc", num_seqs + 1, at::kInt);
    call.items = (const AttentionItem*)header + 1;
    call.num_items = plan.size(0) - 1;
    call.units = header->units;
    call.partial_rows = header->partial_rows;
    call.scale = (float)scale;
    call.window = window;
    TORCH_CHECK(header->lengths == checked_lengths(call.starts, call.seq_lens, num_seqs, tokens) && header->num_seqs == num_seqs &&
                    header->q_heads == q_heads && header->kv_heads == kv_heads && header->window == window,
                "plan was made for other sequences, heads or another window");
    check_places(call, num_seqs, num_blocks, cos_sin.size(0));
    call.single_tokens = sluice::tokens_are_single(call, num_seqs);
    Tensor out = sluice::new_output({tokens, q_heads, dim}, out_dtype.value_or(rows));
    TORCH_CHECK(out.scalar_type() == at::kFloat || out.scalar_type() == at::kBFloat16, "out_dtype must be float32 or bfloat16, not ",
                out.scalar_type());
    call.out = out.data_ptr();
    call.out_type = out.scalar_type() == at::kFloat ? Type::f32 : Type::bf16;
    sluice::call([call](const sluice::Operators& operators) { operators.attention(call); });
    return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sluice_cpu, library) {
    library.def("zeroed_memory(int bytes) -> Tensor", sluice::zeroed_memory);
    library.def("take_ahead(Tensor[] tensors, int first, int last) -> ()", sluice::take_ahead);
    library.def("attention_plan(Tensor query_start_loc, Tensor seq_lens, int q_heads, int kv_heads, int sliding_window) -> Tensor");
    library.def(
        "attention(Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor block_tables, Tensor seq_lens, Tensor query_start_loc, Tensor slot_mapping, Tensor plan, float scale, "
        "int sliding_window, ScalarType? out_dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(sluice_cpu, CPU, library) {
    library.impl("attention_plan", attention_plan);
    library.impl("attention", attention);
}
