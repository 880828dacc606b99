#include "progress.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "quantity.h"

namespace fourmoe::tools {
namespace {

volatile sig_atomic_t interrupted = 0;

void remember(int signal_number) {
  interrupted = 1;
  signal(signal_number, SIG_DFL);
}

std::size_t terminal_columns() {
  winsize size = {};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col : 80;
}

}  // namespace

void watch_for_interrupts() {
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {  // nohup, and & in a script, keep their meaning
    if (signal(number, remember) == SIG_IGN) signal(number, SIG_IGN);
  }
  signal(SIGXFSZ, SIG_IGN);  // a file beyond its limit is an error of the write, after which nothing is left behind
}

Progress::Progress(std::string title)
    : title_(std::move(title)), terminal_(isatty(STDERR_FILENO) == 1), start_(Clock::now()), last_(start_) {}

Progress::~Progress() {
  if (drawn_) std::fputs("\r\x1b[K", stderr);
}

bool Progress::due() {
  if (interrupted != 0) throw Interrupted();
  if (!terminal_) return false;
  const Clock::time_point now = Clock::now();
  if (drawn_ && now - last_ < std::chrono::milliseconds(100)) return false;
  last_ = now;
  return true;
}

// The rest of the old line is cleared after the new one is written, so that nothing blinks.
void Progress::draw(std::string line) {
  line = fmt::format("{}  {}", title_, line);
  line.resize(std::min(line.size(), terminal_columns() - 1));
  std::fputs(fmt::format("\r{}\x1b[K", line).c_str(), stderr);  // a terminal that is gone must not end the work
  std::fflush(stderr);
  drawn_ = true;
}

void Progress::show(std::string_view what) {
  if (due()) draw(std::string(what));
}

void Progress::show_bytes(std::string_view what, i64 done, i64 total) {
  if (!due()) return;
  const f64 seconds = std::chrono::duration<f64>(last_ - start_).count();
  const f64 rate = seconds > 0 ? static_cast<f64>(done) / seconds : 0.0;
  const std::string left = rate > 0 ? duration_text(static_cast<f64>(total - done) / rate) + " left" : "";
  draw(fmt::format("{:3.0f} %  {} of {}  {}/s  {}  {}", 100.0 * static_cast<f64>(done) / std::max<f64>(1.0, total),
                   bytes_text(done), bytes_text(total), bytes_text(static_cast<i64>(rate)), left, what));
}

void Progress::show_count(std::string_view what, i64 done, i64 total) {
  if (!due()) return;
  const f64 seconds = std::chrono::duration<f64>(last_ - start_).count();
  const std::string left =
      done > 0 ? duration_text(seconds / static_cast<f64>(done) * static_cast<f64>(total - done)) + " left" : "";
  draw(fmt::format("{} of {}  {}  {}", done, total, left, what));
}

}  // namespace fourmoe::tools
