#include "attend.cuh"
#include "window.cuh"

namespace mixkv::cuda {

template Shape attend_shape<__nv_bfloat16>(const Attention&, const Device&);
template void launch_attend<__nv_bfloat16>(const Attention&, const Shape&, const Device&, cudaStream_t);
template void launch_window<__nv_bfloat16>(const Window&, const Device&, cudaStream_t);

}  // namespace mixkv::cuda
