// launch: kernels with early starts, and tensor maps, from the host; failures as Status.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <string>

#include "format/number.h"
#include "status.h"

namespace fourmoe::gpu {

inline Status to_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return refuse(Reason::internal, std::string(what) + ": " + cudaGetErrorString(error));
}

struct LaunchShape {
  int blocks;
  int threads;
  int shared_bytes;
  bool early;  // may start before the launch before it has ended (the kernel waits by itself)
};

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream, const Arguments&... arguments) {
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
  if (error != cudaSuccess) return to_status(error, "shared memory of a kernel");
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = shape.early ? 1 : 0;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return to_status(cudaLaunchKernelEx(&config, kernel, arguments...), "launch of a kernel");
}

// Tensor map of rows [count, columns] bf16, contiguous, in boxes of `box_rows` rows by 64 columns with the 128-byte
// swizzle; what lies outside reads as zeros. rows: device memory, aligned to 16; columns a multiple of 8.
Status map_rows(const u16* rows, i64 count, i32 columns, i32 box_rows, CUtensorMap* map);

}  // namespace fourmoe::gpu
