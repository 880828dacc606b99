#include "machine.h"

#include <fmt/format.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <fstream>

#include "numa.h"
#include "status.h"

namespace fourmoe {
namespace {

#if defined(__x86_64__)

// CPUID leaf 7, subleaf 0; all zero where the processor has no such leaf.
struct Leaf7 {
  u32 eax = 0, ebx = 0, ecx = 0, edx = 0;
  Leaf7() { __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx); }
};

// Bits of Intel's manual, volume 2, CPUID: not all are known to clang 14's probe.
bool has_vnni(const Leaf7& leaf) {
  constexpr u32 kVbmi = 1u << 1, kVnni = 1u << 11;  // ecx
  return (leaf.ecx & kVbmi) != 0 && (leaf.ecx & kVnni) != 0;
}

// Linux hands out the tiles' registers to processes that ask: arch_prctl, since 5.16; a kernel that does not know them
// refuses.
bool has_amx(const Leaf7& leaf) {
  constexpr u32 kBf16 = 1u << 22, kFp16 = 1u << 23, kTile = 1u << 24;  // edx; kFp16 is of AVX-512
  constexpr u32 kAll = kBf16 | kFp16 | kTile;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (leaf.edx & kAll) == kAll && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The compiler's probe reads CPUID and XGETBV, so a level counts only when the operating system saves its registers.
CpuLevel detect_level() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!avx2) return CpuLevel::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return CpuLevel::avx2;
  const Leaf7 leaf;
  if (!has_vnni(leaf)) return CpuLevel::avx512;
  return has_amx(leaf) ? CpuLevel::amx : CpuLevel::vnni;
}

#else

CpuLevel detect_level() { return CpuLevel::portable; }

#endif

CpuLevel forced_level(std::string_view word, CpuLevel best) {
  for (const CpuLevel level : kCpuLevels) {
    if (word != cpu_level_name(level)) continue;
    if (level > best) {
      throw Error(Reason::instruction_missing,
                  fmt::format("FOURMOE_CPU_LEVEL={} but this machine offers {} at most", word, cpu_level_name(best)));
    }
    return level;
  }
  throw Error(Reason::instruction_missing,
              fmt::format("FOURMOE_CPU_LEVEL={}, expected portable, avx2, avx512, vnni or amx", word));
}

std::string read_cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

i32 usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  const long online = sysconf(_SC_NPROCESSORS_ONLN);
  return online > 0 ? static_cast<i32>(online) : 1;
}

// Whether the variable holds the second of two words; `otherwise` where it is not set.
bool is_second(const char* variable, std::string_view first, std::string_view second, bool otherwise) {
  const char* value = std::getenv(variable);
  const std::string_view word = value == nullptr ? "" : value;
  if (word.empty()) return otherwise;
  if (word == first || word == second) return word == second;
  throw Error(Reason::argument_invalid, fmt::format("{}={}, expected {} or {}", variable, word, first, second));
}

std::string find_tuning_path() {
  const auto folder = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value != nullptr && *value == '/' ? value : "");  // XDG: relative paths are to be ignored
  };
  if (const char* path = std::getenv("FOURMOE_TUNING")) return path;
  if (const std::string cache = folder("XDG_CACHE_HOME"); !cache.empty()) return cache + "/fourmoe/tuning.json";
  const std::string home = folder("HOME");
  return home.empty() ? "" : home + "/.cache/fourmoe/tuning.json";
}

Machine probe() {
  Machine found;
  found.cpu_name = read_cpu_name();
  found.cpu_level = detect_level();
  found.cores = usable_cores();
  found.cache_bytes = std::max<i64>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
  found.memory_bytes = i64{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  if (const char* word = std::getenv("FOURMOE_CPU_LEVEL"); word != nullptr && *word != '\0') {
    found.cpu_level = forced_level(word, found.cpu_level);
    found.cpu_level_forced = true;
  }
  found.nodes = std::max(1, memory_nodes().count);
  const bool interleaved = is_second("FOURMOE_MEMORY", "local", "interleave", found.nodes > 1);
  found.placement = interleaved ? Placement::interleave : Placement::local;
  found.affinity = is_second("FOURMOE_AFFINITY", "none", "cores", false) ? Affinity::cores : Affinity::none;
#if defined(FOURMOE_CUDA)
  found.cuda = true;
#endif
  found.devices = probe_devices();
  found.tuning_path = find_tuning_path();
  return found;
}

}  // namespace

const Machine& machine() {
  static const Machine found = probe();
  return found;
}

i32 parse_device(std::string_view word) {
  if (word == "host") return -1;
  std::string_view digits = word;
  if (digits.starts_with("cuda:")) digits.remove_prefix(5);
  if (word == "cuda") digits = "0";
  i32 index = -1;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
  if (error == std::errc() && end == digits.data() + digits.size() && index >= 0) return index;
  throw Error(Reason::argument_invalid, fmt::format("device '{}' is neither host nor cuda:0, cuda:1, ...", word));
}

}  // namespace fourmoe
