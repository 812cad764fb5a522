// The standard headers of the operators, included before an instruction set is chosen.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>

#include "amx.h"
#endif

#include "attention_call.h"
#include "thread_pool.h"
#include "operators.h"
