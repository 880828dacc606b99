#include "tune/book.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "backends/list.h"
#include "checkpoint/json.h"

namespace fourmoe::tune {
namespace {

using checkpoint::Object;
using nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

constexpr const char* kFormat = "fourmoe_tuning";
constexpr i32 kFormatVersion = 1;
constexpr std::size_t kMostWords = 256;  // of a step
constexpr f64 kLeastSeconds = 1e-12;     // written as the nanosecond, the least that to_text() tells apart
constexpr f64 kMostSeconds = 1e6;        // of one call: more than a week
constexpr f64 kMostBytesPerSecond = 1e18;

[[noreturn]] void fail(const std::string& what) { throw Error(Reason::file_malformed, what); }

const json& array_of(const Object& object, const char* key) {
  const auto found = object.json->find(key);
  if (found == object.json->end() || !found->is_array()) fail(fmt::format("{} is not a list", key));
  return *found;
}

Object object_of(const json& value, const std::string& name) {
  if (!value.is_object()) fail("an entry is not an object");
  return {&value, name};
}

// Bounds that to_text() keeps: what is read can be written and read again.
f64 number_within(f64 least, f64 most, const Object& object, const char* key) {
  const auto found = object.json->find(key);
  const f64 value = found == object.json->end() || !found->is_number() ? std::nan("") : found->get<f64>();
  if (!(value >= least && value <= most)) fail(fmt::format("{} is not a number from {} to {}", key, least, most));
  return value;
}

f64 duration(const Object& object, const char* key) { return number_within(kLeastSeconds, kMostSeconds, object, key); }

Measured parse_measured(const Object& object, i32* bucket) {
  Measured measured;
  *bucket = object.integer("tokens", 1, 1 << 30);
  if (plan::bucket_of(*bucket) != *bucket)
    fail(fmt::format("tokens is {}, {} would pass", *bucket, plan::bucket_of(*bucket)));
  for (const json& words : array_of(object, "steps")) {
    if (!words.is_string() || words.get_ref<const std::string&>().size() > kMostWords) fail("a step is not a name");
    measured.choice.push_back(words.get<std::string>());
  }
  if (measured.choice.empty() || measured.choice.size() > kStageNames.size()) fail("steps does not hold 1 to 4 names");
  measured.seconds = duration(object, "seconds");
  measured.default_seconds = duration(object, "default_seconds");
  return measured;
}

// What is left out, counted; the first in words.
struct Losses {
  i64 count = 0;
  std::string first;

  template <class Body>
  void guard(const Body& body) {
    try {
      body();
    } catch (const Error& error) {
      if (count++ == 0) first = error.what();
    }
  }
};

void parse_section(const json& value, const std::string& name, Book* book, Losses* losses) {
  const Object object = object_of(value, name);
  const Key key = {object.string("machine"), object.string("version"), object.string("layer")};
  Section section;
  if (object.has("copy_bytes_per_second")) {
    section.copy_bytes_per_second = number_within(1.0, kMostBytesPerSecond, object, "copy_bytes_per_second");
  }
  for (const json& entry : array_of(object, "choices")) {
    losses->guard([&] {
      i32 bucket = 0;
      Measured measured = parse_measured(object_of(entry, name), &bucket);
      section.buckets[bucket] = std::move(measured);
    });
  }
  (*book)[key] = std::move(section);
}

std::string line_of(const OrderedJson& value) {
  return value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

f64 to_nanoseconds(f64 seconds) { return std::max(1.0, std::round(seconds * 1e9)) / 1e9; }

// A choice a line.
std::string to_text(const Key& key, const Section& section) {
  std::string text;
  for (const auto& [name, value] :
       {std::pair{"machine", &key.machine}, {"version", &key.version}, {"layer", &key.layer}}) {
    text += fmt::format("   \"{}\": {},\n", name, line_of(*value));
  }
  if (section.copy_bytes_per_second > 0.0) {
    text += fmt::format("   \"copy_bytes_per_second\": {},\n", line_of(std::round(section.copy_bytes_per_second)));
  }
  std::string choices;
  for (const auto& [bucket, measured] : section.buckets) {
    choices += choices.empty() ? "\n    " : ",\n    ";
    choices += line_of({{"tokens", bucket},
                        {"steps", measured.choice},
                        {"seconds", to_nanoseconds(measured.seconds)},
                        {"default_seconds", to_nanoseconds(measured.default_seconds)}});
  }
  return fmt::format("  {{\n{}   \"choices\": [{}\n   ]\n  }}", text, choices);
}

}  // namespace

Key key_of(const Problem& p, const Machine& machine) {
  Key key;
  const Device* device = device_of(machine);
  key.machine = device == nullptr
                    ? fmt::format("{}, {}", machine.cpu_name, cpu_level_name(machine.cpu_level))
                    : fmt::format("{}, {}.{}, {} SMs", device->name, device->major, device->minor, device->sms);
  for (const Step* step : backends::list()) {
    if (step->variants == nullptr) continue;
    key.version += fmt::format("{}{}.{} {}", key.version.empty() ? "" : ", ", step->room, step->name, step->revision);
  }
  key.layer = fmt::format("hidden {}, inter {}, {} of {} experts, top-{}, {}, {}, {}, {}{}{}", p.hidden, p.inter,
                          p.local_experts, p.experts, p.top_k, p.activation.gated() ? "gated" : "not gated",
                          format::encoding_name(p.encoding), precision_name(p.precision),
                          format::dtype_name(p.activations), p.routing.weight_on_input ? ", weights on the input" : "",
                          p.batch_invariant ? ", batch-invariant" : "");
  return key;
}

Book parse(std::string_view text, const std::string& name, std::vector<std::string>* notes) {
  Book book;
  try {
    const json document = checkpoint::parse_json(text, name);
    const Object object = object_of(document, name);
    object.integer(kFormat, kFormatVersion, kFormatVersion);
    Losses losses;
    for (const json& section : array_of(object, "layers")) {
      losses.guard([&] { parse_section(section, name, &book, &losses); });
    }
    if (losses.count > 0) {
      notes->push_back(fmt::format("{}: {} measured choice{} left out: {}", name, losses.count,
                                   losses.count == 1 ? "" : "s", losses.first));
    }
  } catch (const Error& error) {
    book.clear();
    notes->push_back(fmt::format("{} holds no measured choices and is left out: {}", name, error.what()));
  }
  return book;
}

std::string to_text(const Book& book) {
  std::string layers;
  for (const auto& [key, section] : book) layers += (layers.empty() ? "\n" : ",\n") + to_text(key, section);
  return fmt::format("{{\n \"{}\": {},\n \"layers\": [{}\n ]\n}}\n", kFormat, kFormatVersion, layers);
}

void merge(const Book& from, Book* into) {
  for (const auto& [key, section] : from) {
    Section& known = (*into)[key];
    if (section.copy_bytes_per_second > 0.0) known.copy_bytes_per_second = section.copy_bytes_per_second;
    for (const auto& [bucket, measured] : section.buckets) known.buckets[bucket] = measured;
  }
}

}  // namespace fourmoe::tune
