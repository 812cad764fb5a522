#include "dispatch.h"

#include <algorithm>
#include <stdexcept>

namespace sluice {
namespace {

// Made by the first that is offered, whichever file's that is.
std::vector<const Operators*>& offered() {
    static std::vector<const Operators*> all;
    return all;
}

const Operators* chosen = nullptr;

}  // namespace

bool offer(const Operators& operators) {
    offered().push_back(&operators);
    return true;
}

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Operators* operators : offered()) names.push_back(operators->name);
    return names;
}

void select(const std::string& name) {
    const auto& all = offered();
    const auto found = std::find_if(all.begin(), all.end(), [&](const Operators* operators) { return operators->name == name; });
    if (found == all.end()) throw std::invalid_argument("instruction set '" + name + "' is not loaded");
    chosen = *found;
}

const Operators& operators() {
    if (!chosen) throw std::logic_error("no instruction set is selected");
    return *chosen;
}

}  // namespace sluice
