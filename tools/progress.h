// Progress: one line on a terminal's stderr that says what is done, how fast and how long it will take.
#pragma once

#include <chrono>
#include <exception>
#include <string>
#include <string_view>

#include "format/number.h"

namespace fourmoe::tools {

// The user pressed Ctrl-C: thrown from Progress, so that half-written output is removed on the way out.
class Interrupted : public std::exception {};

// From here on an interrupt is remembered and thrown by the next Progress call; a second one ends the process.
void watch_for_interrupts();

// Silent unless stderr is a terminal. The line is redrawn in place at most ten times a second, in one write, and is
// erased in the end.
class Progress {
 public:
  explicit Progress(std::string title);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void show(std::string_view what);                             // work without a measure
  void show_bytes(std::string_view what, i64 done, i64 total);  // with rate and remaining time
  void show_count(std::string_view what, i64 done, i64 total);

 private:
  using Clock = std::chrono::steady_clock;
  bool due();
  void draw(std::string line);

  std::string title_;
  bool terminal_ = false;
  bool drawn_ = false;
  Clock::time_point start_;
  Clock::time_point last_;
};

}  // namespace fourmoe::tools
