#include "checkpoint/json.h"

#include <fmt/format.h>

#include <unordered_set>
#include <vector>

#include "checkpoint/mapped_file.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using nlohmann::json;

constexpr std::size_t kLargestText = std::size_t{64} << 20;
constexpr int kDeepest = 64;

[[noreturn]] void malformed(std::string_view file, const std::string& what) {
  throw Error(Reason::file_malformed, fmt::format("{}: {}", file, what));
}

// Length of the Python constant that begins at `i`; 0 for none.
std::size_t constant_at(std::string_view text, std::size_t i) {
  for (const std::string_view constant : {"-Infinity", "Infinity", "NaN"}) {
    if (text.compare(i, constant.size(), constant) == 0) return constant.size();
  }
  return 0;
}

// Python's constants outside strings become null.
std::string replace_constants(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (const std::size_t length = in_string ? 0 : constant_at(text, i)) {
      out += "null";
      i += length - 1;
      continue;
    }
    if (text[i] == '"') in_string = !in_string;
    out += text[i];
    if (in_string && text[i] == '\\' && i + 1 < text.size()) out += text[++i];
  }
  return out;
}

// Reads a document for what a parser lets pass: refuses depth and duplicate keys. Faults are the parser's to report. A
// pass of its own: json::parse with a callback searches all of an object for what was left out whenever a part of it
// ends, which takes 13 s for the 46,848 modules that a quantised DeepSeek-V3 names.
class Guard final : public nlohmann::json_sax<json> {
 public:
  explicit Guard(std::string_view file) : file_(file) {}

  bool start_object(std::size_t) override { return keys_.emplace_back(), deeper(); }
  bool end_object() override { return keys_.pop_back(), --depth_, true; }
  bool start_array(std::size_t) override { return deeper(); }
  bool end_array() override { return --depth_, true; }
  bool key(std::string& key) override {
    if (!keys_.back().insert(key).second) malformed(file_, fmt::format("key {} occurs twice", quote(key)));
    return true;
  }
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(json::number_integer_t) override { return true; }
  bool number_unsigned(json::number_unsigned_t) override { return true; }
  bool number_float(json::number_float_t, const std::string&) override { return true; }
  bool string(std::string&) override { return true; }
  bool binary(json::binary_t&) override { return true; }
  bool parse_error(std::size_t, const std::string&, const json::exception&) override { return false; }

 private:
  bool deeper() {
    if (++depth_ > kDeepest) malformed(file_, fmt::format("the JSON is nested deeper than {}", kDeepest));
    return true;
  }

  std::string_view file_;
  int depth_ = 0;
  std::vector<std::unordered_set<std::string>> keys_;
};

}  // namespace

json parse_json(std::string_view text, std::string_view file) {
  if (text.size() > kLargestText) malformed(file, fmt::format("{} bytes are too large for a JSON file", text.size()));
  try {
    const std::string plain = replace_constants(text);
    Guard guard(file);
    json::sax_parse(plain, &guard);
    json document = json::parse(plain);
    if (!document.is_object()) malformed(file, "the JSON is not an object");
    return document;
  } catch (const json::exception& error) {
    malformed(file, "not JSON: " + quote(error.what()));
  }
}

bool Object::has(std::string_view key) const {
  const auto place = json->find(key);
  return place != json->end() && !place->is_null();
}

const json& Object::at(std::string_view key) const {
  if (!has(key)) malformed(file, fmt::format("key \"{}\" is missing", key));
  return *json->find(key);
}

i32 Object::integer(std::string_view key, i32 lowest, i32 highest) const {
  const nlohmann::json& value = at(key);
  // Python libraries write some counts as 8.0.
  const bool whole = value.is_number_float() && value.get<f64>() == std::floor(value.get<f64>());
  const f64 number = value.is_number() ? value.get<f64>() : 0.0;
  if ((!value.is_number_integer() && !whole) || !(number >= lowest && number <= highest)) {
    malformed(file, fmt::format("key \"{}\" must be an integer from {} to {}, not {}", key, lowest, highest,
                                quote(value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace))));
  }
  return static_cast<i32>(number);
}

f32 Object::number(std::string_view key) const {
  const nlohmann::json& value = at(key);
  const f32 number = value.is_number() ? static_cast<f32>(value.get<f64>()) : std::nanf("");
  if (!std::isfinite(number)) malformed(file, fmt::format("key \"{}\" must be a finite number", key));
  return number;
}

bool Object::boolean(std::string_view key) const {
  const nlohmann::json& value = at(key);
  if (!value.is_boolean()) malformed(file, fmt::format("key \"{}\" must be true or false", key));
  return value.get<bool>();
}

std::string Object::string(std::string_view key) const {
  const nlohmann::json& value = at(key);
  if (!value.is_string()) malformed(file, fmt::format("key \"{}\" must be a string", key));
  return value.get<std::string>();
}

Object Object::object(std::string_view key) const {
  const nlohmann::json& value = at(key);
  if (!value.is_object()) malformed(file, fmt::format("key \"{}\" must be an object", key));
  return {&value, file};
}

}  // namespace fourmoe::checkpoint
