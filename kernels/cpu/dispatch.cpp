#include "dispatch.h"

#include <stdexcept>

namespace sluice {
namespace {

struct Candidate {
    const Operators& operators;
    bool runs;
};

// SLUICE_HAS_*: what build.py compiled.
const std::vector<Candidate>& candidates() {
    static const std::vector<Candidate> found = {
#ifdef SLUICE_HAS_avx512_bf16
        {operators_avx512_bf16(), (bool)__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")},
#endif
#ifdef SLUICE_HAS_avx512_vnni
        {operators_avx512_vnni(), (bool)__builtin_cpu_supports("avx512vnni")},
#endif
#ifdef SLUICE_HAS_avx512
        {operators_avx512(), __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                 __builtin_cpu_supports("avx512vl")},
#endif
#ifdef SLUICE_HAS_avx2
        {operators_avx2(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {operators_scalar(), true},
    };
    return found;
}

const Operators* chosen = nullptr;

}  // namespace

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Candidate& candidate : candidates()) {
        if (candidate.runs) names.push_back(candidate.operators.name);
    }
    return names;
}

std::string select(const std::string& name) {
    for (const Candidate& candidate : candidates()) {
        if (candidate.runs && (name == "auto" || name == candidate.operators.name)) {
            chosen = &candidate.operators;
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
