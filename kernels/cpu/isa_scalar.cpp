#include "standard.h"

#define SLUICE_ISA isa_scalar

#include "simd_scalar.h"
#include "isa.h"

namespace sluice {
const Operators& operators_scalar() { return isa_scalar::table("scalar"); }
}  // namespace sluice
