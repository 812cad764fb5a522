// The operators as torch.ops.sluice_cpu.*: checks every shape and type, allocates outputs, calls the table in use.
#include <torch/library.h>
#include <ATen/core/Tensor.h>

#include "dispatch.h"
#include "memory.h"
#include "prepared_calls.h"

namespace {

using at::Tensor;
using sluice::Format;
using sluice::PackedHeader;
using sluice::Type;

Type type_of(const Tensor& x, const char* name) {
    TORCH_CHECK(x.device().is_cpu(), name, " must be on the CPU");
    TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
    if (x.scalar_type() == at::kBFloat16) return Type::bf16;
    TORCH_CHECK(x.scalar_type() == at::kFloat, name, " must be float32 or bfloat16, not ", x.scalar_type());
    return Type::f32;
}

// Of the dtype of what `like` names.
const void* checked_vector(const std::optional<Tensor>& x, const char* name, int64_t size, Type type, const char* like) {
    if (!x.has_value()) return nullptr;
    TORCH_CHECK(x->dim() == 1 && x->size(0) == size, name, " must be [", size, "]");
    TORCH_CHECK(type_of(*x, name) == type, name, " must have the dtype of ", like);
    return x->const_data_ptr();
}

Format format_of(c10::string_view name) {
    if (name == "float32") return Format::f32;
    if (name == "bfloat16") return sluice::operators().bf16;
    if (name == "int8") return Format::int8;
    TORCH_CHECK(name == "int4", "format must be float32, bfloat16, int8 or int4, not ", name);
    return Format::int4;
}

Tensor pack(const Tensor& weight, c10::string_view format_name, bool gated, int64_t group) {
    Format format = format_of(format_name);
    TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0, "weight must be [out, in]");
    TORCH_CHECK(!gated || weight.size(0) % 2 == 0, "a gated layer has as many outputs of gate as of up");
    TORCH_CHECK(format != Format::int4 || (group > 0 && group % 16 == 0 && group <= 4096), "group must be a multiple of 16");
    Type type = type_of(weight, "weight");
    const sluice::Operators& operators = sluice::operators();
    int64_t out = weight.size(0), in = weight.size(1);
    if (format != Format::int4) group = 0;
    const auto bytes = [&](Format of) { return operators.packed_bytes(of, out, in, gated, (int)group); };
    // What `narrow` does not hold takes what `fixed` does, and what that does not hold no more.
    return sluice::weight_memory(bytes(format == Format::narrow ? Format::fixed : format), [&](void* memory) {
        while (!operators.pack(weight.const_data_ptr(), type, format, out, in, gated, (int)group, memory)) {
            format = format == Format::narrow ? Format::fixed : Format::bf16;
        }
        return bytes(format);
    });
}

const PackedHeader& header_of(const Tensor& packed) {
    TORCH_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous() && packed.numel() > (int64_t)sizeof(PackedHeader),
                "packed must be what `pack` made");
    const PackedHeader& header = *(const PackedHeader*)packed.const_data_ptr();
    TORCH_CHECK(header.magic == sluice::packed_magic, "packed must be what `pack` made");
    const sluice::Operators& operators = sluice::operators();
    TORCH_CHECK(header.panel == operators.panel && (header.format != Format::int8 || header.byte_limit == operators.byte_limit) &&
                    (header.format != Format::narrow || operators.bf16 == Format::narrow),
                "packed was made for another instruction set");
    TORCH_CHECK(packed.numel() == operators.packed_bytes(header.format, header.out_features, header.in_features, header.gated, header.group),
                "packed must be what `pack` made");
    return header;
}

// Of a weight that can be multiplied by.
const PackedHeader& weight_header_of(const Tensor& packed) {
    const PackedHeader& header = header_of(packed);
    TORCH_CHECK(header.format != Format::coarse, "packed must be what `pack` made, not a screen");
    return header;
}

Tensor pack_screen(const Tensor& packed, const std::optional<Tensor>& norm_weight) {
    const PackedHeader& header = weight_header_of(packed);
    TORCH_CHECK(header.format != Format::int8 && header.format != Format::int4 && !header.gated,
                "a screen is made of weights in float32 or bfloat16, not gated");
    const sluice::Operators& operators = sluice::operators();
    const Type type = norm_weight.has_value() ? type_of(*norm_weight, "norm_weight") : Type::f32;
    const void* norm = checked_vector(norm_weight, "norm_weight", header.in_features, type, "itself");
    const int64_t bytes = operators.packed_bytes(Format::coarse, header.out_features, header.in_features, false, 0);
    return sluice::weight_memory(bytes, [&](void* screen) {
        operators.pack_screen(packed.const_data_ptr(), norm, type, screen);
        return bytes;
    });
}

Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& norm_weight, double eps,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, std::optional<at::ScalarType> out_dtype) {
    const PackedHeader& header = weight_header_of(packed);
    const Type x_type = type_of(x, "x");
    TORCH_CHECK(x.dim() == 2 && x.size(1) == header.in_features, "x must be [rows, ", header.in_features, "]");
    int64_t rows = x.size(0), outputs = header.gated ? header.out_features / 2 : header.out_features;
    Type type = bias.has_value() ? type_of(*bias, "bias") : x_type;
    if (residual.has_value()) {
        type = type_of(*residual, "residual");
        TORCH_CHECK(residual->dim() == 2 && residual->size(0) == rows && residual->size(1) == outputs, "residual must be [", rows,
                    ", ", outputs, "]");
    }
    Tensor out = sluice::new_output({rows, outputs}, out_dtype.value_or(x.scalar_type()));
    const Type out_type = type_of(out, "out_dtype");
    const sluice::Linear call{
        x.const_data_ptr(),
        rows,
        x_type,
        packed.const_data_ptr(),
        checked_vector(norm_weight, "norm_weight", header.in_features, x_type, "x"),
        (float)eps,
        checked_vector(bias, "bias", header.out_features, type, "residual"),
        residual.has_value() ? residual->const_data_ptr() : nullptr,
        type,
        out.data_ptr(),
        out_type,
    };
    sluice::call([call](const sluice::Operators& operators) { operators.linear(call); });
    return out;
}

// Whether each number of a row is rounded to bfloat16 before it is multiplied by this weight.
bool rounds_rows(const Tensor& packed) { return weight_header_of(packed).format == Format::bf16 && sluice::operators().bf16_rows; }

Tensor greedy_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& screen, const std::optional<Tensor>& norm_weight,
                     double eps) {
    const PackedHeader& header = weight_header_of(packed);
    Type type = type_of(x, "x");
    TORCH_CHECK(x.dim() == 2 && x.size(1) == header.in_features, "x must be [rows, ", header.in_features, "]");
    TORCH_CHECK(!header.gated, "a gated layer's outputs are no logits");
    if (screen.has_value()) {
        const PackedHeader& coarse = header_of(*screen);
        TORCH_CHECK(coarse.format == Format::coarse && coarse.out_features == header.out_features && coarse.in_features == header.in_features,
                    "screen must be what `pack_screen` made of packed");
    }
    Tensor tokens = at::empty({x.size(0)}, at::kLong);
    sluice::operators().greedy_linear({
        x.const_data_ptr(),
        x.size(0),
        type,
        packed.const_data_ptr(),
        screen.has_value() ? screen->const_data_ptr() : nullptr,
        checked_vector(norm_weight, "norm_weight", header.in_features, type, "x"),
        (float)eps,
        tokens.data_ptr<int64_t>(),
    });
    return tokens;
}

Tensor embedding(const Tensor& table, const Tensor& ids) {
    Type type = type_of(table, "table");
    TORCH_CHECK(table.dim() == 2, "table must be [rows, size]");
    TORCH_CHECK(ids.dim() == 1 && ids.is_contiguous() && ids.scalar_type() == at::kLong, "ids must be [tokens] int64");
    const int64_t* id = ids.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < ids.size(0); ++i) {
        TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < table.size(0), "id ", id[i], " is outside the table of ", table.size(0), " rows");
    }
    Tensor out = sluice::new_output({ids.size(0), table.size(1)}, at::kFloat);
    const void* from = table.const_data_ptr();
    const int64_t rows = ids.size(0), size = table.size(1);
    float* to = out.data_ptr<float>();
    sluice::call([=](const sluice::Operators& operators) { operators.embedding(from, id, rows, size, type, to); });
    return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    Type type = type_of(x, "x");
    TORCH_CHECK(x.dim() == 2, "x must be [rows, size]");
    Tensor out = sluice::new_output(x.sizes(), x.scalar_type());
    const void *from = x.const_data_ptr(), *scale = checked_vector(weight, "weight", x.size(1), type, "x");
    const int64_t rows = x.size(0), size = x.size(1);
    void* to = out.data_ptr();
    sluice::call([=](const sluice::Operators& operators) { operators.rms_norm(from, scale, (float)eps, rows, size, type, to); });
    return out;
}

void check_logits(const Tensor& logits) {
    TORCH_CHECK(type_of(logits, "logits") == Type::f32, "logits must be float32");
    TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits must be [rows, vocab], vocab above 0");
}

template <class Number>
const Number* checked_rows(const Tensor& x, const char* name, int64_t rows, int64_t columns) {
    TORCH_CHECK(x.device().is_cpu() && x.is_contiguous(), name, " must be contiguous and on the CPU");
    bool fits = columns == 0 ? x.dim() == 1 : x.dim() == 2 && x.size(1) == columns;
    TORCH_CHECK(fits && x.size(0) == rows, name, " must have ", rows, " rows of ", columns);
    return x.const_data_ptr<Number>();
}

Tensor greedy(const Tensor& logits) {
    check_logits(logits);
    Tensor tokens = at::empty({logits.size(0)}, at::kLong);
    sluice::operators().greedy(logits.const_data_ptr<float>(), logits.size(0), logits.size(1), tokens.data_ptr<int64_t>());
    return tokens;
}

Tensor sample(const Tensor& logits, const Tensor& filters, const Tensor& draws) {
    check_logits(logits);
    int64_t rows = logits.size(0);
    Tensor tokens = at::empty({rows}, at::kLong);
    const double* filter = checked_rows<double>(filters, "filters", rows, 4);
    const int64_t* draw = checked_rows<int64_t>(draws, "draws", rows, 3);
    sluice::operators().sample({logits.const_data_ptr<float>(), rows, logits.size(1), filter, draw, tokens.data_ptr<int64_t>()});
    return tokens;
}

std::tuple<Tensor, Tensor, Tensor> logprobs(const Tensor& logits, const Tensor& tokens, int64_t count) {
    check_logits(logits);
    int64_t rows = logits.size(0), vocab = logits.size(1);
    TORCH_CHECK(count >= 0 && count <= vocab, "count must lie in [0, ", vocab, "]");
    const int64_t* ids = checked_rows<int64_t>(tokens, "tokens", rows, 0);
    for (int64_t i = 0; i < rows; ++i) TORCH_CHECK(ids[i] >= 0 && ids[i] < vocab, "tokens must lie in [0, ", vocab, ")");
    Tensor chosen = at::empty({rows}, at::kFloat), top_ids = at::empty({rows, count}, at::kLong), top = at::empty({rows, count}, at::kFloat);
    sluice::operators().logprobs({logits.const_data_ptr<float>(), rows, vocab, ids, count, chosen.data_ptr<float>(),
                                  top_ids.data_ptr<int64_t>(), top.data_ptr<float>()});
    return {chosen, top_ids, top};
}

std::vector<std::string> instruction_sets() { return sluice::available(); }

void select_one(std::string name) { sluice::select(name); }

int64_t byte_limit() { return sluice::operators().byte_limit; }

bool screens() { return sluice::operators().screens; }

}  // namespace

TORCH_LIBRARY(sluice_cpu, library) {
    library.def("available() -> str[]", instruction_sets);
    library.def("select(str name) -> ()", select_one);
    library.def("byte_limit() -> int", byte_limit);
    library.def("screens() -> bool", screens);
    library.def("pack(Tensor weight, str format, bool gated, int group) -> Tensor");
    library.def(
        "linear(Tensor x, Tensor packed, Tensor? norm_weight, float eps, Tensor? bias, Tensor? residual, ScalarType? out_dtype) -> Tensor");
    library.def("rounds_rows(Tensor packed) -> bool");
    library.def("pack_screen(Tensor packed, Tensor? norm_weight) -> Tensor");
    library.def("greedy_linear(Tensor x, Tensor packed, Tensor? screen, Tensor? norm_weight, float eps) -> Tensor");
    library.def("embedding(Tensor table, Tensor ids) -> Tensor");
    library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
    library.def("greedy(Tensor logits) -> Tensor");
    library.def("sample(Tensor logits, Tensor filters, Tensor draws) -> Tensor");
    library.def("logprobs(Tensor logits, Tensor tokens, int count) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(sluice_cpu, CPU, library) {
    library.impl("pack", pack);
    library.impl("linear", linear);
    library.impl("rounds_rows", rounds_rows);
    library.impl("pack_screen", pack_screen);
    library.impl("greedy_linear", greedy_linear);
    library.impl("embedding", embedding);
    library.impl("rms_norm", rms_norm);
    library.impl("greedy", greedy);
    library.impl("sample", sample);
    library.impl("logprobs", logprobs);
}
