// What every isa_*.cpp compiles for its instruction set: the operators and the table that names them. Not guarded: each includes it once,
// after the standard headers, so that no function of the standard library is compiled for more than the machine may have.
#include "vector_math.h"
#include "norm.h"
#include "embedding.h"
#include "packing.h"
#include "rows.h"
#include "tiles.h"
#include "narrow.h"
#include "matrix_tiles.h"
#include "scratch.h"
#include "linear.h"
#include "sampling.h"
#include "screen_tiles.h"
#include "screen.h"
#include "greedy_linear.h"
#include "attention_tiles.h"
#include "attention_matrices.h"
#include "attention_heads.h"
#include "attention_rows.h"
#include "attention.h"

namespace SLUICE_ISA {

inline const sluice::Operators& table(const char* name) {
    static const sluice::Operators operators{
        name,           panel_outputs,  Simd::byte_limit, Simd::narrow ? Format::narrow : Simd::fixed_point ? Format::fixed : Format::bf16,
        bf16_rows,      Simd::screens,  packed_bytes,     pack,
        pack_screen,    linear,         greedy_linear,    embedding_rows,
        rms_norm_rows,  greedy,         sample,           logprobs,
        attention,
    };
    return operators;
}

}  // namespace SLUICE_ISA
