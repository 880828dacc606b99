// Machine: what this host and its GPUs can do, probed once. The only place where environment variables are read.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "format/number.h"

namespace fourmoe {

// Instruction levels of the cpu room, each including those before it.
//   avx2    AVX2, FMA, F16C
//   avx512  AVX-512 F, BW, DQ, VL
//   vnni    AVX-512 VNNI, VBMI
//   amx     AVX-512 FP16, AMX tiles of bf16, with the operating system's permission to use their registers
enum class CpuLevel : u8 { portable, avx2, avx512, vnni, amx };
inline constexpr std::array kCpuLevels = {CpuLevel::portable, CpuLevel::avx2, CpuLevel::avx512, CpuLevel::vnni,
                                          CpuLevel::amx};

constexpr std::string_view cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::portable: return "portable";
    case CpuLevel::avx2: return "avx2";
    case CpuLevel::avx512: return "avx512";
    case CpuLevel::vnni: return "vnni";
    case CpuLevel::amx: return "amx";
  }
  return "unknown";
}

// Where pages of packed weights lie on a host of several NUMA nodes: `local` to the threads that pack them, as the
// kernel does unasked, or taking turns over the nodes, which serves threads of all nodes alike.
enum class Placement : u8 { local, interleave };

// `cores`: each thread of the library's pool stays on a core of its own. Threads of the caller's are never touched.
enum class Affinity : u8 { none, cores };

// A GPU as its driver describes it.
struct Device {
  i32 index = 0;  // CUDA's number of it
  std::string name;
  i32 major = 0;  // compute capability
  i32 minor = 0;
  i32 sms = 0;           // streaming multiprocessors
  i64 memory_bytes = 0;  // its own memory
  i64 l2_bytes = 0;
};

struct Machine {
  std::string cpu_name;                     // as the processor reports itself; "unknown" where it does not
  CpuLevel cpu_level = CpuLevel::portable;  // best level that processor and operating system offer, or the forced one
  bool cpu_level_forced = false;            // by FOURMOE_CPU_LEVEL
  i32 cores = 1;                            // hardware threads that this process may use
  i64 memory_bytes = 0;                     // physical memory of the host
  i64 cache_bytes = 0;                      // last-level cache, shared by whom the host decides; 0 where unknown
  i32 nodes = 1;                            // NUMA nodes whose memory this process may use
  Placement placement = Placement::local;
  Affinity affinity = Affinity::none;
  bool cuda = false;            // this build holds code for GPUs
  std::vector<Device> devices;  // GPUs in CUDA's order; none where the build or the driver has none
  i32 device = -1;              // what a plan is for: an index into devices, or -1 for the host
  std::string tuning_path;      // of the choices that were measured here (tune/book.h); empty: none
};

// The GPU that the machine's plans are for; null for the host, or when there is no such GPU.
inline const Device* device_of(const Machine& machine) {
  const bool there = machine.device >= 0 && machine.device < static_cast<i32>(machine.devices.size());
  return there ? &machine.devices[machine.device] : nullptr;
}

// "host" is -1, "cuda:2" and "2" are 2, "cuda" is 0. Throws Error(argument_invalid) for other words.
i32 parse_device(std::string_view word);

// Probed at the first call. FOURMOE_CPU_LEVEL=portable|avx2|avx512|vnni|amx forces a level; one that the machine lacks,
// or another word, throws Error(instruction_missing). FOURMOE_MEMORY=local|interleave places packed weights; without it
// they are interleaved on several nodes and local on one. FOURMOE_AFFINITY=none|cores; without it, none. Another word
// throws Error(argument_invalid). FOURMOE_TUNING names tuning_path, empty for none; without it, it
// is fourmoe/tuning.json in XDG_CACHE_HOME or in ~/.cache.
const Machine& machine();

// The GPUs of this process, from the driver; none in a build without CUDA (gpu/runtime.cu, gpu/none.cc).
std::vector<Device> probe_devices();

}  // namespace fourmoe
