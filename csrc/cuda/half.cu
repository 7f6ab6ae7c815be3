#include "attend.cuh"
#include "window.cuh"

namespace mixkv::cuda {

template Shape attend_shape<__half>(const Attention&, const Device&);
template void launch_attend<__half>(const Attention&, const Shape&, const Device&, cudaStream_t);
template void launch_window<__half>(const Window&, const Device&, cudaStream_t);

}  // namespace mixkv::cuda
