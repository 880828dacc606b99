#include "machine.h"

#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <fstream>

#include "status.h"

namespace fourmoe {
namespace {

// The compiler's probe reads CPUID and XGETBV, so a level counts only when the operating system saves its registers.
CpuLevel detect_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? CpuLevel::avx512 : avx2 ? CpuLevel::avx2 : CpuLevel::portable;
#else
  return CpuLevel::portable;
#endif
}

CpuLevel forced_level(std::string_view word, CpuLevel best) {
  for (const CpuLevel level : {CpuLevel::portable, CpuLevel::avx2, CpuLevel::avx512}) {
    if (word != cpu_level_name(level)) continue;
    if (level > best) {
      throw Error(Reason::instruction_missing,
                  fmt::format("FOURMOE_CPU_LEVEL={} but this machine offers {} at most", word, cpu_level_name(best)));
    }
    return level;
  }
  throw Error(Reason::instruction_missing,
              fmt::format("FOURMOE_CPU_LEVEL={}, expected portable, avx2 or avx512", word));
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
#if defined(FOURMOE_CUDA)
  found.cuda = true;
#endif
  found.devices = probe_devices();
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
