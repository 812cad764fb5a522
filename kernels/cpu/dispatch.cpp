#include "dispatch.h"

#include <algorithm>
#include <stdexcept>

#ifdef SLUICE_HAS_amx
#include "amx.h"
#endif

namespace sluice {
namespace {

struct Candidate {
    const Operators* operators;
    bool runs;
};

// SLUICE_HAS_*: what build.py compiled.
std::vector<Candidate> best_first() {
    std::vector<Candidate> found = {
#ifdef SLUICE_HAS_amx
        {&operators_amx(), __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
                              __builtin_cpu_supports("avx512vnni") && amx_granted()},
#endif
#ifdef SLUICE_HAS_avx512_bf16
        {&operators_avx512_bf16(), (bool)__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")},
#endif
#ifdef SLUICE_HAS_avx512_vnni
        {&operators_avx512_vnni(), (bool)__builtin_cpu_supports("avx512vnni")},
#endif
#ifdef SLUICE_HAS_avx512
        {&operators_avx512(), __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                 __builtin_cpu_supports("avx512vl")},
#endif
#ifdef SLUICE_HAS_avx2
        {&operators_avx2(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {&operators_scalar(), true},
    };
#if defined(SLUICE_HAS_avx512_bf16) && defined(SLUICE_HAS_avx512_vnni)
    // Intel's dot product of bf16 takes longer than the two products of floats that it stands for: with fixed point and VNNI a prompt is
    // computed 2.7 times as fast (Emerald Rapids).
    if (__builtin_cpu_is("intel")) {
        const auto bf16 = std::find_if(found.begin(), found.end(), [](const Candidate& one) { return one.operators == &operators_avx512_bf16(); });
        std::iter_swap(bf16, bf16 + 1);
    }
#endif
    return found;
}

const std::vector<Candidate>& candidates() {
    static const std::vector<Candidate> found = best_first();
    return found;
}

const Operators* chosen = nullptr;

}  // namespace

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Candidate& candidate : candidates()) {
        if (candidate.runs) names.push_back(candidate.operators->name);
    }
    return names;
}

std::string select(const std::string& name) {
    for (const Candidate& candidate : candidates()) {
        if (candidate.runs && (name == "auto" || name == candidate.operators->name)) {
            chosen = candidate.operators;
            return chosen->name;
        }
    }
    throw std::invalid_argument("instruction set '" + name + "' is not built, or this processor does not have it");
}

const Operators& operators() {
    if (!chosen) select("auto");
    return *chosen;
}

}  // namespace sluice
