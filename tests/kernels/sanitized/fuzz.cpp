// Every operator on drawn shapes, with memory that ends where its arguments end: for the address and undefined-behaviour sanitizers.
//
// Built without torch from the operators' own sources; `fuzz SEED CASES` runs each instruction set that was compiled and that this
// processor has. Outputs must have been written and be finite; what they are is for the tests in Python. `fuzz planted` writes behind an
// output, which must end the program.
#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "attention_plan.h"
#include "dispatch.h"
#include "memory.h"

namespace {

using sluice::Format;
using sluice::Operators;

Type type_of(Chance& chance) { return chance.one_in(2) ? Type::f32 : Type::bf16; }

Format format_of(const Operators& operators, Chance& chance) {
    const int64_t drawn = chance.between(0, 5);
    return drawn == 5 ? operators.bf16 : (Format)drawn;
}

// In `format`, or in one that holds what it does not.
Exact packed_weight(const Operators& operators, Chance& chance, Exact& weight, Type type, Format format, int64_t out, int64_t in, bool gated) {
    const int group = format == Format::int4 ? (int)chance.between(1, 8) * 16 : 0;
    for (;; format = format == Format::narrow ? Format::fixed : Format::bf16) {
        Exact packed(operators.packed_bytes(format, out, in, gated, group));
        if (operators.pack(weight.data(), type, format, out, in, gated, group, packed.data())) return packed;
    }
}

void fuzz_linear(const Operators& operators, Chance& chance) {
    const bool gated = chance.one_in(3);
    const int64_t rows = chance.one_in(20) ? 0 : chance.between(1, chance.one_in(4) ? 70 : 9);
    const int64_t outputs = chance.between(1, 150), out = outputs * (gated ? 2 : 1);
    const int64_t in = chance.between(1, chance.one_in(8) ? 1200 : 300);  // several blocks too
    const Type type = type_of(chance), x_type = chance.one_in(2) ? type_of(chance) : type, out_type = chance.one_in(4) ? type_of(chance) : type;
    const Format format = format_of(operators, chance);
    Numbers weight(chance, out * in, type), x(chance, rows * in, x_type);
    Numbers norm(chance, in, x_type), bias(chance, out, type), residual(chance, rows * outputs, type);
    Exact packed = packed_weight(operators, chance, weight, type, format, out, in, gated);
    Exact apart(rows * outputs * bytes_of(out_type));
    const bool in_place = out_type == type && chance.one_in(4);  // the residual may be the output
    Exact& to = in_place ? residual : apart;
    operators.linear({
        x.data(),
        rows,
        x_type,
        packed.data(),
        chance.one_in(2) ? norm.data() : nullptr,
        1e-5f,
        chance.one_in(2) ? bias.data() : nullptr,
        in_place || chance.one_in(2) ? residual.data() : nullptr,
        type,
        to.data(),
        out_type,
    });
    expect_written(to, rows * outputs, out_type, "linear");
}

void fuzz_greedy_linear(const Operators& operators, Chance& chance) {
    const int64_t rows = chance.one_in(20) ? 0 : chance.between(1, chance.one_in(4) ? 70 : 9);
    const int64_t out = chance.between(1, chance.one_in(4) ? 900 : 150), in = chance.between(1, chance.one_in(8) ? 1200 : 300);
    const Type type = type_of(chance);
    const Format format = format_of(operators, chance);
    Numbers weight(chance, out * in, type), x(chance, rows * in, type), norm(chance, in, type);
    // An output that has no bound, outputs that are all equal, a row that is not to be screened.
    const bool plain = format != Format::int8 && format != Format::int4;
    if (plain && chance.one_in(4)) put(weight, chance.between(0, out * in - 1), chance.one_in(2) ? INFINITY : 1e30f, type);
    if (chance.one_in(4)) {
        for (int64_t i = 0; i < out * in; ++i) put(weight, i, 1.0f, type);
    }
    if (rows && chance.one_in(4)) put(x, chance.between(0, rows * in - 1), chance.one_in(2) ? NAN : 1e30f, type);
    Exact packed = packed_weight(operators, chance, weight, type, format, out, in, false);
    const bool screened = plain && !chance.one_in(3);
    Exact screen(screened ? operators.packed_bytes(Format::coarse, out, in, false, 0) : 0), tokens(rows * 8), best(rows * 8), logits(rows * out * 4);
    if (screened) operators.pack_screen(packed.data(), chance.one_in(2) ? norm.data() : nullptr, type, screen.data());
    const void* normed = chance.one_in(2) ? norm.data() : nullptr;
    operators.linear({x.data(), rows, type, packed.data(), normed, 1e-5f, nullptr, nullptr, type, logits.data(), Type::f32});
    operators.greedy(logits.of<float>(), rows, out, best.of<int64_t>());
    operators.greedy_linear({x.data(), rows, type, packed.data(), screened ? screen.data() : nullptr, normed, 1e-5f, tokens.of<int64_t>()});
    for (int64_t row = 0; row < rows; ++row) {
        const long long found = tokens.of<int64_t>()[row], wanted = best.of<int64_t>()[row];
        if (found == wanted) continue;
        std::fprintf(stderr, "greedy_linear: token %lld, not %lld, of %lld\n", found, wanted, (long long)out);
        std::exit(3);
    }
}

void fuzz_norm_and_embedding(const Operators& operators, Chance& chance) {
    const int64_t rows = chance.between(0, 20), size = chance.between(0, 200), entries = chance.between(1, 30);
    const Type type = type_of(chance);
    Numbers x(chance, rows * size, type), weight(chance, size, type), table(chance, entries * size, type);
    Exact normed(rows * size * bytes_of(type)), found(rows * size * 4), ids(rows * 8);
    for (int64_t i = 0; i < rows; ++i) ids.of<int64_t>()[i] = chance.between(0, entries - 1);
    operators.rms_norm(x.data(), weight.data(), 1e-5f, rows, size, type, normed.data());
    operators.embedding(table.data(), ids.of<int64_t>(), rows, size, type, found.of<float>());
    expect_written(normed, rows * size, type, "rms_norm");
    expect_written(found, rows * size, Type::f32, "embedding");
}

void fuzz_sampling(const Operators& operators, Chance& chance) {
    const int64_t rows = chance.between(0, 5), vocab = chance.between(1, chance.one_in(4) ? 5000 : 300);
    const int64_t count = chance.between(0, std::min<int64_t>(vocab, 20));
    Numbers logits(chance, rows * vocab, Type::f32);
    const float spread = chance.one_in(3) ? 0.0f : (float)chance.between(1, 20);  // all equal, flat or steep
    for (int64_t i = 0; i < rows * vocab; ++i) logits.of<float>()[i] *= spread;
    Exact filters(rows * 4 * 8), draws(rows * 3 * 8), tokens(rows * 8), best(rows * 8);
    for (int64_t row = 0; row < rows; ++row) {
        double* filter = filters.of<double>() + row * 4;
        filter[0] = chance.one_in(5) ? 0.0 : 0.1 * (double)chance.between(1, 30);
        filter[1] = chance.one_in(2) ? 0.0 : (double)chance.between(1, vocab + 5);
        filter[2] = chance.one_in(2) ? 1.0 : 0.01 * (double)chance.between(1, 99);
        filter[3] = chance.one_in(2) ? 0.0 : 0.01 * (double)chance.between(1, 99);
        for (int64_t i = 0; i < 3; ++i) draws.of<int64_t>()[row * 3 + i] = chance.between(0, INT64_MAX);
    }
    operators.greedy(logits.of<float>(), rows, vocab, best.of<int64_t>());
    operators.sample({logits.of<float>(), rows, vocab, filters.of<double>(), draws.of<int64_t>(), tokens.of<int64_t>()});
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t token : {best.of<int64_t>()[row], tokens.of<int64_t>()[row]}) {
            if (token >= 0 && token < vocab) continue;
            std::fprintf(stderr, "sampling: token %lld of %lld\n", (long long)token, (long long)vocab);
            std::exit(3);
        }
    }
    Exact chosen(rows * 4), top_ids(rows * count * 8), top(rows * count * 4);
    operators.logprobs({logits.of<float>(), rows, vocab, tokens.of<int64_t>(), count, chosen.of<float>(), top_ids.of<int64_t>(), top.of<float>()});
    expect_written(chosen, rows, Type::f32, "logprobs");
    expect_written(top, rows * count, Type::f32, "logprobs");
}

void fuzz_attention(const Operators& operators, Chance& chance) {
    const bool scaled = chance.one_in(3);
    const Type type = scaled ? Type::int8 : type_of(chance), out_type = type_of(chance);
    const Type rows = chance.one_in(2) ? Type::f32 : scaled ? Type::bf16 : type;
    const int64_t number = scaled ? 1 : bytes_of(type), row_number = bytes_of(rows);
    const int64_t dim = 16 * chance.between(1, chance.one_in(4) ? 16 : 4), kv_heads = chance.between(1, 4);
    const int64_t q_heads = kv_heads * chance.between(1, 5), block_size = 16 * chance.between(1, 3);
    const int64_t window = chance.one_in(3) ? chance.between(1, 300) : 0, num_seqs = chance.between(1, 4);
    std::vector<int32_t> lens, starts{0};
    int64_t longest = 1, tokens = 0, needed = 0;
    for (int64_t seq = 0; seq < num_seqs; ++seq) {
        const int64_t chunk = chance.one_in(2) ? 1 : chance.between(0, 40), context = chance.between(0, chance.one_in(3) ? 700 : 60);
        lens.push_back((int32_t)std::max<int64_t>(chunk + context, 1));
        tokens += chunk;
        starts.push_back((int32_t)tokens);
        longest = std::max<int64_t>(longest, lens.back());
        needed += sluice::divide_up(lens.back(), block_size);
    }
    const int64_t stride = sluice::divide_up(longest, block_size), wide = (q_heads + 2 * kv_heads) * dim;
    const int64_t of_values = kv_heads * dim * block_size, of_keys = of_values + (scaled ? 4 * kv_heads * block_size : 0);
    std::vector<int32_t> blocks(needed);
    for (int64_t i = 0; i < needed; ++i) blocks[i] = (int32_t)i;
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(7));
    Exact tables(num_seqs * stride * 4), positions(tokens * 8), slots(tokens * 8), out(tokens * q_heads * dim * bytes_of(out_type));
    for (int64_t seq = 0, taken = 0; seq < num_seqs; ++seq) {
        int32_t* table = tables.of<int32_t>() + seq * stride;
        for (int64_t i = 0; i < sluice::divide_up(lens[seq], block_size); ++i) table[i] = blocks[taken++];
        for (int64_t token = starts[seq]; token < starts[seq + 1]; ++token) {
            const int64_t position = lens[seq] - (starts[seq + 1] - token);
            positions.of<int64_t>()[token] = position;
            slots.of<int64_t>()[token] = chance.one_in(20) ? -1 : table[position / block_size] * block_size + position % block_size;
        }
    }
    Numbers fused(chance, tokens * wide, rows), cos_sin(chance, longest * dim, Type::f32);
    // As bytes, and as scales: whatever bf16 numbers near 1 hold.
    Numbers cache(chance, needed * (of_keys + of_values) * number / bytes_of(type), type);
    char* qkv = fused.of<char>();
    const sluice::AttentionPlan plan =
        sluice::AttentionPlanner(starts.data(), lens.data(), num_seqs, q_heads, kv_heads, window).plan(omp_get_max_threads());
    Exact items((int64_t)(plan.items.size() * sizeof(sluice::AttentionItem)));
    std::copy(plan.items.begin(), plan.items.end(), items.of<sluice::AttentionItem>());
    sluice::Attention call{};
    call.type = type;
    call.rows = rows;
    call.q = qkv;
    call.k = qkv + q_heads * dim * row_number;
    call.v = qkv + (q_heads + kv_heads) * dim * row_number;
    call.q_stride = call.k_stride = call.v_stride = wide;
    call.tokens = tokens;
    call.q_heads = q_heads;
    call.kv_heads = kv_heads;
    call.dim = dim;
    call.cos_sin = cos_sin.of<float>();
    call.positions = positions.of<int64_t>();
    call.slots = slots.of<int64_t>();
    call.k_cache = cache.data();
    call.v_cache = cache.of<char>() + of_keys * number;
    call.block_stride = of_keys + of_values;
    call.block_size = block_size;
    call.tables = tables.of<int32_t>();
    call.table_stride = stride;
    call.seq_lens = lens.data();
    call.starts = starts.data();
    call.single_tokens = sluice::tokens_are_single(call, num_seqs);
    call.items = items.of<sluice::AttentionItem>();
    call.num_items = (int64_t)plan.items.size();
    call.units = plan.units;
    call.partial_rows = plan.partial_rows;
    call.scale = 1.0f / std::sqrt((float)dim);
    call.window = window;
    call.out = out.data();
    call.out_type = out_type;
    operators.attention(call);
    expect_written(out, tokens * q_heads * dim, out_type, "attention");
}

void write_behind(const Operators& operators, Chance& chance) {
    Numbers x(chance, 64, Type::f32), weight(chance, 64, Type::f32);
    Exact out(64 * 4 - 1);
    operators.rms_norm(x.data(), weight.data(), 1e-5f, 1, 64, Type::f32, out.data());
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 2 && std::string(arguments[1]) == "planted") {
        Chance chance(0);
        sluice::select(sluice::available().front());
        write_behind(sluice::operators(), chance);
        return 0;
    }
    if (count != 3) return std::fprintf(stderr, "usage: fuzz SEED CASES | fuzz planted\n"), 2;
    const int64_t seed = std::atoll(arguments[1]), cases = std::atoll(arguments[2]);
    for (const std::string& name : sluice::available()) {
        sluice::select(name);
        Chance chance((uint64_t)seed);
        for (int64_t i = 0; i < cases; ++i) {
            omp_set_num_threads((int)chance.between(1, 3));
            for (auto fuzz : {fuzz_linear, fuzz_greedy_linear, fuzz_norm_and_embedding, fuzz_sampling, fuzz_attention}) {
                fuzz(sluice::operators(), chance);
            }
        }
        std::printf("%s: %lld cases of each operator\n", name.c_str(), (long long)cases);
    }
}
