// The operators in use: of the best instruction set that was built and that this processor has, unless one is named.
#pragma once

#include <string>
#include <vector>

#include "operators.h"

namespace sluice {

const Operators& operators();

// Names that can be selected here, best first.
std::vector<std::string> available();

// Takes "auto" or one of `available()`; gives the name in use. Throws std::invalid_argument for another. Packed weights belong to the
// instruction set that packed them.
std::string select(const std::string& name);

}  // namespace sluice
