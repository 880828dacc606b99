// launch: how every kernel is launched, and waits for the one before it.
//
// Launches in a stream overlap: a kernel's blocks may be placed while the kernel before it still runs, and then wait in
// begin(). So the gap between two kernels of microseconds shrinks, and nothing else changes.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "format/number.h"
#include "status.h"

namespace fourmoe::gpu {

inline constexpr bool kOverlap = true;

// First in every kernel: nothing that another kernel wrote may be read, and nothing written, before it.
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
  attributes[0].val.programmaticStreamSerializationAllowed = kOverlap ? 1 : 0;
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
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  if (error == cudaSuccess) return {};
  return refuse(Reason::internal, std::string(name) + " was not launched: " + cudaGetErrorString(error));
}

}  // namespace fourmoe::gpu
