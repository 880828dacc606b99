#include "quantity.h"

#include <fmt/format.h>

#include <cmath>

namespace fourmoe::tools {

std::string bytes_text(i64 bytes) {
  if (bytes < 1024) return fmt::format("{} B", bytes);
  f64 value = static_cast<f64>(bytes);
  const char* unit = "";
  for (const char* next : {"KiB", "MiB", "GiB", "TiB"}) {
    if (value < 1000.0) break;
    value /= 1024.0;
    unit = next;
  }
  return fmt::format("{:.{}f} {}", value, value < 10.0 ? 2 : value < 100.0 ? 1 : 0, unit);
}

std::string duration_text(f64 seconds) {
  if (seconds < 1e-3) return fmt::format("{:.{}f} us", 1e6 * seconds, seconds < 1e-5 ? 2 : seconds < 1e-4 ? 1 : 0);
  if (seconds < 1.0) return fmt::format("{:.{}f} ms", 1e3 * seconds, seconds < 1e-2 ? 2 : seconds < 1e-1 ? 1 : 0);
  if (seconds < 60.0) return fmt::format("{:.1f} s", seconds);
  const i64 whole = static_cast<i64>(seconds);
  if (whole < 3600) return fmt::format("{} min {:02} s", whole / 60, whole % 60);
  return fmt::format("{} h {:02} min", whole / 3600, whole / 60 % 60);
}

std::string count_text(f64 count) {
  if (std::fabs(count) < 100.0) return fmt::format("{:.4g}", count);
  const std::string digits = fmt::format("{:.0f}", std::fabs(count));
  std::string text = count < 0 ? "-" : "";
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

std::string number_text(f64 value) {
  if (value == 0.0) return "0";
  if (!std::isfinite(value)) return fmt::format("{}", value);
  const f64 size = std::fabs(value);
  return size >= 1e-3 && size < 1e5 ? fmt::format("{:.3g}", value) : fmt::format("{:.1e}", value);
}

}  // namespace fourmoe::tools
