#include "standard.h"

#define SLUICE_ISA isa_scalar

#include "simd_scalar.h"
#include "isa.h"

static const bool offered = sluice::offer(isa_scalar::table("scalar"));
