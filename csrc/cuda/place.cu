#include "place.h"

#include <dlfcn.h>

#include <mutex>
#include <vector>

// Only a torch with CUDA has it: weak, so that the library loads everywhere.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace mixkv::cuda {

using StreamGetter = AOTITorchError (*)(int32_t, void**);

static StreamGetter find_stream_getter() {
  if (&aoti_torch_get_current_cuda_stream != nullptr) return &aoti_torch_get_current_cuda_stream;
  // Linked against a torch without CUDA, the library may not see the part of torch that has it.
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
  STD_TORCH_CHECK(found != nullptr, "this torch has no CUDA");
  return reinterpret_cast<StreamGetter>(found);
}

static cudaStream_t current_stream(int device) {
  static const StreamGetter getter = find_stream_getter();
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "torch gives no stream for CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

static const Device& device_of(int index) {
  constexpr int kMostDevices = 256;
  static Device devices[kMostDevices];
  static std::once_flag known[kMostDevices];
  STD_TORCH_CHECK(index >= 0 && index < kMostDevices, "no CUDA device ", index);
  std::call_once(known[index], [index] {
    Device device{index};
    check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    check(cudaDeviceGetAttribute(&device.block_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    check(cudaDeviceGetAttribute(&device.multiprocessor_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
    devices[index] = device;
  });
  return devices[index];
}

static int index_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cuda(), "a tensor on a CUDA device is needed");
  return tensor.get_device_index();
}

Place::Place(const Tensor& tensor)
    : guard_(index_of(tensor)), device_(device_of(tensor.get_device_index())), stream_(current_stream(device_.index)) {
  // This library's CUDA runtime is its own: a thread in which torch has not touched the device yet would begin with device 0.
  mixkv::cuda::check(cudaSetDevice(device_.index));
}

void Place::check(std::initializer_list<const Tensor*> tensors) const {
  for (const Tensor* tensor : tensors)
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == device_.index, "all tensors must be on CUDA device ", device_.index);
}

void Place::check(const std::optional<Tensor>& tensor) const {
  if (tensor) check({&*tensor});
}

Tensor Place::empty(std::initializer_list<int64_t> sizes, ScalarType type) const {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes.begin()[d], 1);
  AtenTensorHandle made = nullptr;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const auto error = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides.data(), dtype, aoti_torch_device_type_cuda(),
                                              device_.index, &made);
  STD_TORCH_CHECK(error == 0, "no memory could be allocated on CUDA device ", device_.index);
  return Tensor(made);
}

Tensor vector_rows(const Tensor& tensor) {
  bool fits = is_row_dense(tensor) && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  const int64_t bytes = tensor.element_size();
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) fits = fits && (tensor.size(d) <= 1 || tensor.stride(d) * bytes % 16 == 0);
  if (fits) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace mixkv::cuda
