// device_memory: what GPU tests need of a device: whether there is one, and memory that starts poisoned.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <vector>

#include "format/number.h"

namespace fourmoe::gpu_tests {

inline bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

#define FOURMOE_NEEDS_DEVICE() \
  if (!fourmoe::gpu_tests::has_device()) GTEST_SKIP() << "no CUDA device"

inline void expect_cuda(cudaError_t error) { EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

// `count` values in device memory, every byte 0xa5 unless they are given.
template <class T>
class Device {
 public:
  explicit Device(i64 count) : count_(count) {
    expect_cuda(cudaMalloc(&data_, bytes() + 16));
    poison();
  }
  explicit Device(const std::vector<T>& values) : Device(static_cast<i64>(values.size())) { write(values); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data_); }

  void poison() { expect_cuda(cudaMemset(data_, 0xa5, bytes() + 16)); }
  void write(const std::vector<T>& values) {
    expect_cuda(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> read() const {  // after all work
    expect_cuda(cudaDeviceSynchronize());
    std::vector<T> values(count_);
    expect_cuda(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }
  T* get() const { return data_; }

 private:
  i64 bytes() const { return count_ * static_cast<i64>(sizeof(T)); }
  i64 count_;
  T* data_ = nullptr;
};

// The value that poisoned memory holds.
template <class T>
T poison() {
  T value;
  std::memset(static_cast<void*>(&value), 0xa5, sizeof value);
  return value;
}

// Steps of f32 between two numbers; 0 when both are NaN.
inline i64 ulps(f32 a, f32 b) {
  if (std::isnan(a) && std::isnan(b)) return 0;
  const auto order = [](f32 x) {
    const i32 bits = std::bit_cast<i32>(x);
    return bits < 0 ? -i64{bits & 0x7fffffff} : i64{bits};
  };
  return std::abs(order(a) - order(b));
}

}  // namespace fourmoe::gpu_tests
