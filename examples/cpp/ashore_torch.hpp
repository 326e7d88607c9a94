// Adds libtorch tensors to a state of ashore: `add(state, "weight", tensor)`.
//
// Views are saved packed, and restored in place.
#pragma once
#include <ATen/ATen.h>
#include <ashore.hpp>
#if __has_include(<c10/cuda/CUDAStream.h>) && defined(USE_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

inline int32_t ashore_dtype_of(const at::Tensor &tensor) {
  switch (tensor.scalar_type()) {
    case at::kBool: return ASHORE_BOOL;
    case at::kByte: return ASHORE_U8;
    case at::kChar: return ASHORE_I8;
    case at::kShort: return ASHORE_I16;
    case at::kInt: return ASHORE_I32;
    case at::kLong: return ASHORE_I64;
    case at::kHalf: return ASHORE_F16;
    case at::kBFloat16: return ASHORE_BF16;
    case at::kFloat: return ASHORE_F32;
    case at::kDouble: return ASHORE_F64;
    case at::kComplexFloat: return ASHORE_C64;
    default: TORCH_CHECK(false, "ashore does not know this dtype: ", tensor.scalar_type());
  }
}

inline void add(ashore::state &state, const std::string &name, const at::Tensor &tensor) {
  TORCH_CHECK(tensor.layout() == at::kStrided && !tensor.is_conj() && !tensor.is_neg(), name, " is no plain memory");
  ashore_tensor t{};
  t.name = name.c_str();
  t.data = tensor.data_ptr();
  t.shape = tensor.sizes().data();
  t.strides = tensor.strides().data();
  t.dims = static_cast<uint32_t>(tensor.dim());
  t.dtype = ashore_dtype_of(tensor);
  TORCH_CHECK(tensor.is_cpu() || tensor.is_cuda(), name, " is on ", tensor.device());
#ifdef USE_CUDA
  if (tensor.is_cuda()) {
    t.on_device = 1;
    t.stream = {c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream(), static_cast<uint32_t>(tensor.get_device())};
  }
#else
  TORCH_CHECK(tensor.is_cpu(), name, " is on a GPU: compile with USE_CUDA");
#endif
  state.tensor(t, std::make_shared<at::Storage>(tensor.storage())); // the storage stays until nothing reads it
}
