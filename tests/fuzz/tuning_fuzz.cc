// Fuzz target: a file of measured choices. Whatever is taken from it must be fit to be compared, stored and read again.
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <string_view>

#include "tune/book.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  using namespace fourmoe;
  std::vector<std::string> notes;
  const tune::Book book = tune::parse({reinterpret_cast<const char*>(data), size}, "fuzz", &notes);
  for (const auto& [key, section] : book) {
    for (const auto& [bucket, measured] : section.buckets) {
      const bool sane = plan::bucket_of(bucket) == bucket && !measured.choice.empty() && measured.choice.size() <= 4 &&
                        std::isfinite(measured.seconds) && measured.seconds > 0.0;
      if (!sane) std::abort();
    }
  }
  const std::size_t known = notes.size();
  const tune::Book again = tune::parse(tune::to_text(book), "fuzz", &notes);
  if (notes.size() != known || again.size() > book.size()) std::abort();
  return 0;
}
