#include "standard.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#define SLUICE_ISA isa_avx512_bf16
#define SLUICE_VNNI
#define SLUICE_BF16
#include "simd_avx512.h"
#include "isa.h"

static const bool offered = sluice::offer(isa_avx512_bf16::table("avx512_bf16"));
