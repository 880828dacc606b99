// Quantity: numbers as people read them.
#pragma once

#include <string>

#include "format/number.h"

namespace fourmoe::tools {

std::string bytes_text(i64 bytes);       // "17 B", "442.0 KiB", "1.50 GiB"
std::string duration_text(f64 seconds);  // "310 us", "2.5 ms", "3.1 s", "2 min 41 s", "1 h 02 min"
std::string count_text(f64 count);       // "77,419"; two digits after the point below 100
std::string number_text(f64 value);      // three significant digits, short exponent: "1.1e-3", "0.25"

}  // namespace fourmoe::tools
