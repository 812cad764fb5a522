#include "standard.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#define SLUICE_ISA isa_amx
#define SLUICE_VNNI
#define SLUICE_AMX
#include "simd_avx512.h"
#include "isa.h"

static const bool offered = sluice::amx_granted() && sluice::offer(isa_amx::table("amx"));
