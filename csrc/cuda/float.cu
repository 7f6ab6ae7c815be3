#include "attend.cuh"
#include "window.cuh"

namespace mixkv::cuda {

template Shape attend_shape<float>(const Attention&, const Device&);
template void launch_attend<float>(const Attention&, const Shape&, const Device&, cudaStream_t);
template void launch_window<float>(const Window&, const Device&, cudaStream_t);

}  // namespace mixkv::cuda
