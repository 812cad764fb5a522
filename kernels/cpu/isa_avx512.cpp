#include "standard.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define SLUICE_ISA isa_avx512

#include "simd_avx512.h"
#include "isa.h"

static const bool offered = sluice::offer(isa_avx512::table("avx512"));
