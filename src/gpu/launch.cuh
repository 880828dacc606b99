// launch: kernels with early starts, and tensor maps, from the host; failures as Status.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <string>

#include "format/number.h"
#include "status.h"

namespace fourmoe::gpu {

// A failure is told once: it is not left for the next who asks for the last error, and what others left is not ours.
inline Status to_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return refuse(Reason::internal, std::string(what) + ": " + cudaGetErrorString(error));
}

// Launches kernel(arguments...) after all that the stream has.
template <class... Parameters, class... Arguments>
Status launch_after(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, void* stream,
                    const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  return to_status(cudaLaunchKernelEx(&config, kernel, arguments...), name);
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

// Rows of bf16 in device memory, aligned to 16 bytes.
struct MappedRows {
  const u16* data;
  i64 count;
  i32 columns;  // a multiple of 8
  i64 stride;   // elements between two rows, a multiple of 8
};

// Tensor map of `rows` in boxes of `box_rows` rows by 64 columns with the 128-byte swizzle; what lies outside reads as
// zeros.
Status map_rows(const MappedRows& rows, i32 box_rows, CUtensorMap* map);

// Kernels of route and combine: one struct of arguments, and begin() first, so that they may all start early.

// First in every kernel: nothing that another kernel wrote may be read, and nothing written, before it. The wait comes
// first: the launch after this one relies on what the launches before this one wrote (sm90/gemm1.h: follows_rows).
__device__ __forceinline__ void begin() {
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
}

struct Grid {
  i64 blocks = 0;
  i32 threads = 0;
  i32 shared_bytes = 0;  // dynamic
  i32 cluster = 1;       // blocks of a cluster; divides blocks
};

// Launches kernel(args); no blocks, no launch.
template <class Args>
Status launch(const char* name, void (*kernel)(Args), const Grid& grid, const Args& args, void* stream) {
  if (grid.blocks == 0) return {};
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = grid.cluster;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<u32>(grid.blocks));
  config.blockDim = dim3(static_cast<u32>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = grid.cluster > 1 ? 2 : 1;
  return to_status(cudaLaunchKernelEx(&config, kernel, args), name);
}

}  // namespace fourmoe::gpu
