// The record of what kernels found wrong: what it names, and which of two faults it keeps.
#include "gpu/fault.h"

#include <gtest/gtest.h>

namespace fourmoe {
namespace {

using gpu::Awaited;
using gpu::FaultKind;

std::string said(u64 key) {
  gpu::Fault fault;
  fault.first = fault.settled = key;
  fault.value = 9, fault.experts = 8;
  return gpu::to_status(fault).detail;
}

bool mentions(const std::string& text, const std::string& words) { return text.find(words) != std::string::npos; }

TEST(Fault, KeepsWhatAKeyWasMadeOf) {
  for (const i32 token : {0, 1, 4096, 0x7ffffffe}) {
    const u64 key = gpu::fault_key(FaultKind::scale, token, 0xfffff, 0xff);
    EXPECT_EQ(gpu::fault_kind(key), FaultKind::scale);
    EXPECT_EQ(gpu::fault_token(key), token);
    EXPECT_EQ(gpu::fault_position(key), 0xfffff);
    EXPECT_EQ(gpu::fault_byte(key), 0xff);
  }
  EXPECT_EQ(gpu::fault_kind(gpu::Fault{}.first), FaultKind::none);
  for (const Awaited awaited : {Awaited::empty, Awaited::tokens, Awaited::sums}) {
    for (const i32 of : {0, 1, 1024, 0xffffff}) {
      const u64 key = gpu::wait_key(awaited, of);
      EXPECT_EQ(gpu::fault_kind(key), FaultKind::wait);
      EXPECT_EQ(gpu::fault_awaited(key), awaited);
      EXPECT_EQ(gpu::fault_of(key), of);
    }
  }
}

// Kernels keep the least key.
TEST(Fault, RanksWaitsBeforeTokensAndTokensByNumber) {
  const u64 ranked[] = {gpu::wait_key(Awaited::empty, 0),
                        gpu::wait_key(Awaited::tokens, 3),
                        gpu::wait_key(Awaited::tokens, 1024),
                        gpu::wait_key(Awaited::sums, 0),
                        gpu::wait_key(Awaited::sums, 63),
                        gpu::fault_key(FaultKind::logits, 0, 0),
                        gpu::fault_key(FaultKind::id, 0, 7),
                        gpu::fault_key(FaultKind::scale, 1, 2, 0x80),
                        gpu::fault_key(FaultKind::scale, 1, 3, 0x7f),
                        gpu::fault_key(FaultKind::id, 0x7ffffffe, 0),
                        gpu::Fault{}.first};
  for (std::size_t i = 1; i < std::size(ranked); ++i) EXPECT_LT(ranked[i - 1], ranked[i]) << i;
}

TEST(Fault, SaysWhatWasAwaitedOrRefused) {
  EXPECT_TRUE(mentions(said(gpu::wait_key(Awaited::empty, 0)), "memory to be emptied"));
  EXPECT_TRUE(mentions(said(gpu::wait_key(Awaited::tokens, 17)), "gemm1 of local expert 17"));
  EXPECT_TRUE(mentions(said(gpu::wait_key(Awaited::sums, 5)), "gemm2 of token 5"));
  EXPECT_TRUE(mentions(said(gpu::fault_key(FaultKind::logits, 0, 0)), "token 0"));
  EXPECT_TRUE(mentions(said(gpu::fault_key(FaultKind::id, 3, 2)), "topk_ids[3, 2] is 9, expected -1 to 7"));
  EXPECT_EQ(said(gpu::Fault{}.first), "");
}

}  // namespace
}  // namespace fourmoe
