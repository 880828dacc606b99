// Fault: what kernels found wrong with a call's input, kept until the host asks.
//
// A kernel cannot refuse a call: the refused token gets no picks, combine writes NaN into its row, and the lowest such
// token is kept here; or, before any token, a wait that a kernel gave up. The record is the same whatever the order in
// which threads report.
#pragma once

#include "format/number.h"
#include "status.h"

namespace fourmoe::gpu {

enum class FaultKind : u8 { none, logits, id, scale, wait };

// What a wait that was given up was for.
enum class Awaited : u8 { rows, empty, tokens, sums };

// In device memory, or in host memory mapped into the device; caller's. Starts as Fault{}; kernels only ever lower
// `first`, so a fault stays through any number of replays until the host writes Fault{} again.
struct Fault {
  u64 first = ~u64{0};    // key of a wait that was given up, or of the lowest refused token; all ones for none
  u64 settled = ~u64{0};  // the key to which value and experts belong
  i64 value = 0;          // FaultKind::id: the id
  i32 experts = 0;        // FaultKind::id: experts of the layer
};

// Of a refused token. Ordered by token, then by position: of an id in the token's picks, of a scale in its blocks
// (below 2^20), whose byte the key holds.
FOURMOE_HD u64 fault_key(FaultKind kind, i32 token, i32 position, u8 byte = 0) {
  return (static_cast<u64>(token) + 1) << 32 | static_cast<u64>(position) << 12 | static_cast<u64>(byte) << 4 |
         static_cast<u64>(kind);
}
// Of a wait that was given up, before all refusals: the call's other rows are not valid either. Ordered by what was
// waited for, in the order of a call's waits, for those that follow are given up too; then by expert or token.
FOURMOE_HD u64 wait_key(Awaited awaited, i32 of) {
  return static_cast<u64>(awaited) << 28 | static_cast<u64>(of) << 4 | static_cast<u64>(FaultKind::wait);
}
FOURMOE_HD FaultKind fault_kind(u64 key) { return key == ~u64{0} ? FaultKind::none : static_cast<FaultKind>(key & 15); }
FOURMOE_HD u8 fault_byte(u64 key) { return static_cast<u8>(key >> 4); }
FOURMOE_HD i32 fault_position(u64 key) { return static_cast<i32>(key >> 12 & 0xfffff); }
FOURMOE_HD i32 fault_token(u64 key) { return static_cast<i32>((key >> 32) - 1); }
FOURMOE_HD Awaited fault_awaited(u64 key) { return static_cast<Awaited>(key >> 28 & 15); }
FOURMOE_HD i32 fault_of(u64 key) { return static_cast<i32>(key >> 4 & 0xffffff); }  // expert or token awaited

// The refusal that the host gives for the same token; ok for none. Read the fault after its stream is done.
Status to_status(const Fault& fault);

}  // namespace fourmoe::gpu
