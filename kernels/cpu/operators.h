// The border between the torch bindings and the operators: plain structs, no torch. One table an instruction set, filled by isa_*.cpp.
//
// Guarantees of every table: a row of an output depends on that row's inputs alone, bit for bit - not on the other rows, on the split
// into chunks or on the number of threads. Shapes are checked by the bindings; here they are believed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sluice {

enum class Type : int32_t { f32 = 0, bf16 = 1, int8 = 2 };  // int8: of a cache alone
// fixed: of bf16 weights, packing.h; coarse: of any of the weights that stand as they are, screen.h; narrow: fixed's numbers in 12 bits, narrow.h
enum class Format : int32_t { f32 = 0, bf16 = 1, int8 = 2, int4 = 3, fixed = 4, coarse = 5, narrow = 6 };

// What stands before the panels of a packed weight, 64 bytes; offsets are bytes from the start of the header.
struct PackedHeader {
    uint32_t magic;
    Format format;
    int32_t panel;         // outputs a panel, as the instruction set that packed it has them
    int32_t group;         // int4: inputs that share a scale; coarse: 1 where the weight's own product rounds its rows to bf16; else 0
    int64_t out_features;  // of the layer as a checkpoint has it; twice the outputs when gated
    int64_t in_features;
    int64_t inputs;        // of a panel, padding included
    int32_t gated;         // panels of gate and up alternate
    int32_t byte_limit;    // int8: the magnitude of an output's largest weight, else 0
    int64_t panels;        // bytes from the header to the first panel
    int64_t panel_bytes;
};
static_assert(sizeof(PackedHeader) == 64);
constexpr uint32_t packed_magic = 0x4b505553;

// out = epilogue(norm(x) W^T + bias) + residual
struct Linear {
    const void* x;           // [rows, in] of `x_type`
    int64_t rows;
    Type x_type;             // of x and norm_weight
    const void* packed;      // PackedHeader and its panels
    const void* norm_weight; // [in], or null: RMSNorm before the product
    float eps;
    const void* bias;        // [out_features], or null
    const void* residual;    // [rows, outputs], or null; may be `out` itself
    Type type;               // of bias and residual
    void* out;               // [rows, outputs] of out_type
    Type out_type;
};

// The first of each row's greatest outputs, as `greedy` finds it among linear's; no gate, bias or residual.
struct GreedyLinear {
    const void* x;            // [rows, in] of `type`
    int64_t rows;
    Type type;                // of x and norm_weight
    const void* packed;       // PackedHeader and its panels, not `coarse`
    const void* screen;       // of the same weights, or null: what pack_screen made
    const void* norm_weight;  // [in], or null
    float eps;
    int64_t* tokens;          // [rows]
};

// The next token of each row of float logits; -1 where the row holds NaN, +inf or nothing finite.
struct Sample {
    const float* logits;    // [rows, vocab]
    int64_t rows;
    int64_t vocab;
    const double* filters;  // [rows, 4]: temperature (0: greedy), top-k (0: off), top-p (1: off), min-p (0: off)
    const int64_t* draws;   // [rows, 3]: seed, choice, output position
    int64_t* tokens;        // [rows]
};

// Natural-log probabilities of one token a row and of its `count` best, best first.
struct Logprobs {
    const float* logits;    // [rows, vocab]
    int64_t rows;
    int64_t vocab;
    const int64_t* tokens;  // [rows]
    int64_t count;          // 0 <= count <= vocab
    float* chosen;          // [rows]
    int64_t* top_ids;       // [rows, count]
    float* top;             // [rows, count]
};

struct Attention;  // attention_call.h

struct Operators {
    const char* name;
    int32_t panel;  // of the weights that it packs and multiplies by: outputs a panel,
    int32_t byte_limit;  // the magnitude to which it rounds an output's largest INT8 weight,
    Format bf16;         // and the format in which it best multiplies bf16 weights;
    bool bf16_rows;      // whether a product with weights in Format::bf16 rounds its rows to bf16
    bool screens;        // whether greedy_linear is faster with a screen
    int64_t (*packed_bytes)(Format format, int64_t out_features, int64_t in_features, bool gated, int group);
    // weight: [out_features, in_features] of `type`; packed: packed_bytes() bytes, 64-byte aligned. False where the format is `narrow` or
    // `fixed` and does not hold some of the weights: they are for `fixed`, and `bf16`.
    bool (*pack)(const void* weight, Type type, Format format, int64_t out_features, int64_t in_features, bool gated, int group,
                 void* packed);
    // packed: f32, bf16, fixed or narrow, not gated; screen: packed_bytes() bytes of a `coarse` weight, 64-byte aligned.
    // norm_weight: [in_features] of `type`, what rows are multiplied by, or null.
    void (*pack_screen)(const void* packed, const void* norm_weight, Type type, void* screen);
    void (*linear)(const Linear& call);
    void (*greedy_linear)(const GreedyLinear& call);
    // table: [num_rows, size] of `type`; ids within it; out: [rows, size].
    void (*embedding)(const void* table, const int64_t* ids, int64_t rows, int64_t size, Type type, float* out);
    void (*rms_norm)(const void* x, const void* weight, float eps, int64_t rows, int64_t size, Type type, void* out);
    void (*greedy)(const float* logits, int64_t rows, int64_t vocab, int64_t* tokens);
    void (*sample)(const Sample& call);
    void (*logprobs)(const Logprobs& call);
    void (*attention)(const Attention& call);
};

// Makes known what one instruction set has compiled, as its file does when it is loaded. True.
bool offer(const Operators& operators);

}  // namespace sluice
