// Counts the instructions that the cpu room's products execute, at every level of this machine: a child process
// multiplies, the parent lets it take one instruction at a time and notes where it stands. Counts are exact, the same
// on a busy machine, and know every instruction that the processor knows, AMX too.
// fourmoe_steps prints JSON: for each case the instructions that more blocks of columns take, by address.
#include <fmt/format.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "backends/cpu/tiles.h"
#include "machine.h"

extern "C" const char __executable_start;  // the linker's

namespace {

using namespace fourmoe;
using namespace fourmoe::cpu;
using Steps = std::map<u64, i64>;  // executions by address in the program's file

constexpr int kSkipped = 77;                                        // what ctest takes for a test that could not run
constexpr std::array kFormats = {"nvfp4", "mxfp4", "bf16", "f32"};  // weights::PanelFormat

struct Case {
  CpuLevel level;
  const Atom* atom;
  weights::PanelFormat format;
  i32 tokens;
  i32 more;  // blocks of columns, a multiple of what the loop takes at a time
};

// Memory from a cache line on; its bytes are usual scales of each format.
class Lines {
 public:
  explicit Lines(i64 bytes) : data_(static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {
    std::memset(data_, 0x77, (bytes + 63) / 64 * 64);
  }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  ~Lines() { std::free(data_); }
  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
};

// Runs in the child: one strip of two panels, between two stops.
[[noreturn]] void multiply_stopped(const Case& c, i32 blocks) {
  const i64 stride = weights::panel_bytes(c.format, kOrder, blocks * 16);
  const i64 pitch = i64{c.tokens + kSpareRows} * kPanelRows;
  const Lines panels(kStripPanels * stride), sums(kStripPanels * pitch * 4);
  const Lines x(i64{blocks} * c.tokens * c.atom->step_bytes + kSlack);
  if (c.atom->enter != nullptr) c.atom->enter(c.tokens);
  const Strip strip = {
      panels.data(), stride, kStripPanels, blocks, x.data(), c.tokens, reinterpret_cast<f32*>(sums.data()), pitch};
  const Atom::Multiply multiply = c.atom->multiply[static_cast<int>(c.format)][c.tokens - 1];
  raise(SIGSTOP);
  multiply(strip);
  raise(SIGSTOP);
  _exit(0);
}

// Waits for the child's next stop and returns its signal.
int wait_for_stop(pid_t child) {
  int status = 0;
  if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
    throw std::runtime_error("the traced process ended early");
  return WSTOPSIG(status);
}

Steps trace(const Case& c, i32 blocks) {
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("no process to trace");
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(kSkipped);
    multiply_stopped(c, blocks);
  }
  wait_for_stop(child);
  const u64 start = reinterpret_cast<u64>(&__executable_start);
  Steps steps;
  for (int signal = SIGTRAP; signal == SIGTRAP;) {
    ++steps[static_cast<u64>(ptrace(PTRACE_PEEKUSER, child, offsetof(user_regs_struct, rip), nullptr)) - start];
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) throw std::runtime_error("no single steps here");
    signal = wait_for_stop(child);
    if (signal != SIGTRAP && signal != SIGSTOP)
      throw std::runtime_error(fmt::format("the product ended by signal {}", signal));
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return steps;
}

// What twice as many columns take more: the loop over columns alone, without what stands around it.
nlohmann::json count(const Case& c) {
  const Steps few = trace(c, c.more);
  nlohmann::json steps = nlohmann::json::object();
  for (const auto& [address, times] : trace(c, 2 * c.more)) {
    const auto before = few.find(address);
    const i64 more = times - (before == few.end() ? 0 : before->second);
    if (more != 0) steps[fmt::format("{:x}", address)] = more;
  }
  return {{"level", cpu_level_name(c.level)},
          {"format", kFormats[static_cast<int>(c.format)]},
          {"tokens", c.tokens},
          {"blocks", kStripPanels * c.more},
          {"steps", steps}};
}

// What a level brings of its own: every format at one token, its first one at more.
std::vector<Case> cases() {
  const std::pair<CpuLevel, const Atom*> atoms[] = {
      {CpuLevel::portable, atom_portable()}, {CpuLevel::avx2, atom_avx2()}, {CpuLevel::avx512, atom_avx512()},
      {CpuLevel::vnni, atom_vnni()},         {CpuLevel::amx, atom_amx()},   {CpuLevel::amx, atom_amx_mxfp4()}};
  std::vector<Case> all;
  for (const auto& [level, atom] : atoms) {
    if (level > machine().cpu_level || atom == nullptr) continue;
    const i32 more = level >= CpuLevel::vnni ? 16 : weights::kGroupBlocks;
    bool first = true;
    for (i32 format = 0; format < kPanelFormats; ++format) {
      if (atom->multiply[format][0] == nullptr) continue;
      for (const i32 tokens : {1, 4, 16, 32, 48, 128}) {
        if (tokens > atom->tile || (tokens > 1 && !first)) continue;
        all.push_back({level, atom, weights::PanelFormat(format), tokens, more});
      }
      first = false;
    }
  }
  return all;
}

}  // namespace

int main() {
  try {
    nlohmann::json found = nlohmann::json::array();
    for (const Case& c : cases()) found.push_back(count(c));
    fmt::print("{}\n", found.dump());
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "fourmoe_steps: {}\n", error.what());
    return kSkipped;
  }
}
