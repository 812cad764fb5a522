// The operators in use: those of the instruction set that is selected, of all whose files have been loaded.
#pragma once

#include <string>
#include <vector>

#include "operators.h"

namespace sluice {

// Throws std::logic_error before one is selected.
const Operators& operators();

// Names that can be selected.
std::vector<std::string> available();

// Takes one of `available()`; throws std::invalid_argument for another. Packed weights belong to the instruction set that packed them.
void select(const std::string& name);

}  // namespace sluice
