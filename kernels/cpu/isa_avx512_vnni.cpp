#include "standard.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#define SLUICE_ISA isa_avx512_vnni
#define SLUICE_VNNI
#include "simd_avx512.h"
#include "isa.h"

static const bool offered = sluice::offer(isa_avx512_vnni::table("avx512_vnni"));
