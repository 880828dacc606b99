// json: documents from outside, with every fault turned into Error(file_malformed) that names the file and the key.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "format/number.h"

namespace fourmoe::checkpoint {

// Parses `text`, called `file` in messages. Refuses duplicate keys, nesting deeper than 64 and texts above 64 MiB;
// accepts the constants NaN, Infinity and -Infinity, which Python writes, as null.
nlohmann::json parse_json(std::string_view text, std::string_view file);

// An object of a document with the name of its file: what typed access needs for its messages.
struct Object {
  const nlohmann::json* json;  // an object; the document's owner's
  std::string file;

  bool has(std::string_view key) const;  // present and not null
  // All throw file_malformed when the key is absent or of another type.
  i32 integer(std::string_view key, i32 lowest, i32 highest) const;
  f32 number(std::string_view key) const;  // finite
  bool boolean(std::string_view key) const;
  std::string string(std::string_view key) const;
  Object object(std::string_view key) const;

 private:
  const nlohmann::json& at(std::string_view key) const;
};

}  // namespace fourmoe::checkpoint
