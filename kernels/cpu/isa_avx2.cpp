#include "standard.h"

#pragma GCC target("avx2,fma,f16c")
#define SLUICE_ISA isa_avx2

#include "simd_avx2.h"
#include "isa.h"

static const bool offered = sluice::offer(isa_avx2::table("avx2"));
