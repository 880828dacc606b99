// Device memory for tests and benchmarks: a vector of its own, and failures that end the program with their place.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "format/number.h"

namespace fourmoe::testing {

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

inline bool has_hopper() {
  int count = 0, major = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return false;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && major == 9;
}

template <class T>
class DeviceVector {
 public:
  DeviceVector() = default;
  explicit DeviceVector(i64 count) : count_(count) {
    require(cudaMalloc(&data_, std::max<i64>(count, 1) * sizeof(T)), "cudaMalloc");
    require(cudaMemset(data_, 0xff, std::max<i64>(count, 1) * sizeof(T)), "cudaMemset");  // poison: NaN in all formats
  }
  explicit DeviceVector(const std::vector<T>& values) : DeviceVector(static_cast<i64>(values.size())) {
    require(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  DeviceVector(DeviceVector&& other) noexcept { *this = std::move(other); }
  DeviceVector& operator=(DeviceVector&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~DeviceVector() { cudaFree(data_); }

  T* data() const { return data_; }
  i64 size() const { return count_; }
  std::vector<T> download() const {
    std::vector<T> values(count_);
    require(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "download");
    return values;
  }
  void upload(const std::vector<T>& values) const {  // size() of them
    require(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }

 private:
  T* data_ = nullptr;
  i64 count_ = 0;
};

}  // namespace fourmoe::testing
