#include "standard.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#define SLUICE_ISA isa_amx
#define SLUICE_VNNI
#define SLUICE_AMX
#include "simd_avx512.h"
#include "isa.h"

namespace sluice {
const Operators& operators_amx() { return isa_amx::table("amx"); }
}  // namespace sluice
