// The table of one instruction set. Included by a file that defines MIXKV_TABLE and MIXKV_NAME and is compiled for that set.
#include "attend.h"
#include "bounds.h"
#include "codes.h"
#include "directions.h"
#include "norm.h"
#include "pack.h"
#include "quantise.h"
#include "window.h"

namespace mixkv {

extern const Kernels MIXKV_TABLE;
const Kernels MIXKV_TABLE = {
    MIXKV_NAME,
    {
        {attend<float, float>, attend_codes<float>, quantise<float>, rotate<float>, rotate_back<float>, finish<float>, window_attention<float>, projected_norm<float>, chunk_scores<float>, row_norms<float>, mean_direction<float>,
         row_cosines<float>},
        {attend<Half, Half>, attend_codes<Half>, quantise<Half>, rotate<Half>, rotate_back<Half>, finish<Half>, window_attention<Half>, projected_norm<Half>, chunk_scores<Half>, row_norms<Half>, mean_direction<Half>,
         row_cosines<Half>},
        {attend<Bfloat16, Bfloat16>, attend_codes<Bfloat16>, quantise<Bfloat16>, rotate<Bfloat16>, rotate_back<Bfloat16>, finish<Bfloat16>, window_attention<Bfloat16>, projected_norm<Bfloat16>, chunk_scores<Bfloat16>, row_norms<Bfloat16>, mean_direction<Bfloat16>,
         row_cosines<Bfloat16>},
    },
    pack,
    attend_scratch,
    window_scratch,
    norm_scratch,
    bounds_scratch,
};

}  // namespace mixkv
