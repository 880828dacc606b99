// The command `fourmoe`: exit code 0 on success alone, 1 on failure, 2 on wrong usage; errors are one line on stderr.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <new>

#include "backends/list.h"
#include "command.h"
#include "describe.h"
#include "executor.h"
#include "flow.h"
#include "machine.h"
#include "progress.h"
#include "status.h"
#include "table.h"

namespace fourmoe::tools {

std::vector<std::string> backend_names() {
  std::vector<std::string> names = {"auto"};
  for (const Step* step : backends::list()) {
    const std::string room(step->room);
    if (step->in_room() && std::find(names.begin(), names.end(), room) == names.end()) names.push_back(room);
  }
  return names;
}

namespace {

// The words as the option's type: "auto|cpu|reference".
CLI::Option* one_of(CLI::Option* option, const std::vector<std::string>& words) {
  std::string type;
  for (const std::string& word : words) type += (type.empty() ? "" : "|") + word;
  return option->check(CLI::IsMember(words).description(""))->type_name(type)->capture_default_str();
}

std::vector<std::string> precision_names() {
  std::vector<std::string> names;
  for (const Precision precision : kPrecisions) names.emplace_back(precision_name(precision));
  return names;
}

}  // namespace

CLI::Validator within(f64 least, f64 most) {
  const auto check = [least, most](const std::string& text) -> std::string {
    f64 value = 0.0;
    if (CLI::detail::lexical_cast(text, value) && value >= least && value <= most) return "";
    return fmt::format("'{}' is not a number from {:.10g} to {:.10g}", text, least, most);
  };
  return CLI::Validator(check, "");
}

void add_backend(CLI::App* app, std::string* backend) {
  one_of(app->add_option("--backend", *backend, "which room computes"), backend_names());
}

void add_precision(CLI::App* app, std::string* precision) {
  one_of(app->add_option("--precision", *precision, "activations of 16 bits, or quantised too: to NVFP4, or to int8"),
         precision_names());
}

void add_threads(CLI::App* app, int* threads) {
  app->add_option("--threads", *threads, "threads to use; 0: all that the machine offers")
      ->check(within(0, kMostThreads))
      ->type_name("N")
      ->capture_default_str();
}

void add_device(CLI::App* app, std::string* device) {
  const auto check = [](const std::string& text) -> std::string {
    try {
      parse_device(text);
      return "";
    } catch (const Error& error) {
      return error.what();
    }
  };
  app->add_option("--device", *device, "where the layer lives; host, or cuda:0 with a backend for GPUs, if not given")
      ->check(check)
      ->type_name("host|cuda:N");
}

i32 device_of(const std::string& device, const std::string& backend) {
  if (!device.empty()) return parse_device(device);
  for (const Step* step : backends::list()) {
    if (step->room == backend && step->place == Place::device) return 0;
  }
  return -1;
}

CLI::Option* add_layer(CLI::App* app, int* layer, const std::string& description) {
  return app->add_option("--layer", *layer, description)->check(within(0, 1 << 20))->type_name("N");
}

CLI::Option* add_shape(CLI::App* app, std::string* shape) {
  const auto check = [](const std::string& text) -> std::string {
    try {
      parse_shape(text);
      return "";
    } catch (const Error& error) {
      return error.what();
    }
  };
  return app->add_option("--shape", *shape, "hidden, inter, experts, top-k of one layer, or a model's name")
      ->check(check)
      ->type_name("NAME|H,I,E,k");
}

namespace {

constexpr const char* kUnwritable = "standard output cannot be written";

// Where stderr cannot be written the exit code has to do; fmt::print would throw.
void print_error(std::string line) {
  std::replace(line.begin(), line.end(), '\n', ' ');
  std::fputs(fmt::format("fourmoe: {}\n", printable(line)).c_str(), stderr);
}

int report(std::string_view reason, std::string_view line) {
  print_error(fmt::format("{}: {}", reason, line));
  return kFailure;
}

int report_usage(const CLI::App& app, std::string_view line) {
  std::string command = "fourmoe";
  for (const CLI::App* used : app.get_subcommands()) command += " " + used->get_name();
  print_error(fmt::format("{}; see {} --help", line, command));
  return kUsage;
}

// The word in the place of the command when there is no such command; null when all is well.
const char* find_unknown_command(const CLI::App& app, int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return nullptr;
  const auto named = [&](const CLI::App* sub) { return sub->get_name() == argv[1]; };
  return app.get_subcommands(named).empty() ? argv[1] : nullptr;
}

int run(const std::vector<Command>& commands) {
  for (const Command& command : commands) {
    if (!command.app->parsed()) continue;
    const int code = command.run();
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
      throw Error(Reason::write_failed, kUnwritable);
    }
    return code;
  }
  return kUsage;
}

int guard(const CLI::App& app, const std::vector<Command>& commands) {
  try {
    return run(commands);
  } catch (const CLI::ParseError& error) {  // options that contradict each other
    return report_usage(app, error.what());
  } catch (const Interrupted&) {
    return report("interrupted", "stopped; nothing was written");
  } catch (const Error& error) {
    return report(reason_name(error.reason()), error.what());
  } catch (const std::filesystem::filesystem_error& error) {  // a folder that may not be searched, a loop of links
    return report(reason_name(Reason::file_unreadable),
                  fmt::format("{}: {}", error.path1().string(), error.code().message()));
  } catch (const std::bad_alloc&) {
    return report(reason_name(Reason::out_of_memory), "an allocation failed");
  } catch (const std::exception& error) {
    if (std::ferror(stdout) != 0) return report(reason_name(Reason::write_failed), kUnwritable);
    return report(reason_name(Reason::internal), error.what());
  }
}

}  // namespace
}  // namespace fourmoe::tools

int main(int argc, char** argv) {
  using namespace fourmoe;
  using namespace fourmoe::tools;
  CLI::App app{"fourmoe: Mixture-of-Experts layers on 4-bit NVFP4 weights", "fourmoe"};
  app.set_version_flag("--version", "fourmoe " FOURMOE_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  const std::vector<Command> commands = {add_inspect(app), add_run(app),   add_quantize(app), add_verify(app),
                                         add_explain(app), add_bench(app), add_tune(app),     add_support(app)};
  app.footer("fourmoe COMMAND --help tells each option. Exit codes: 0 success, 1 failure, 2 wrong usage.");
  if (const char* word = find_unknown_command(app, argc, argv)) {
    return report_usage(app, fmt::format("there is no command '{}'", word));
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {  // --help and --version
    const int code = app.exit(asked);
    return std::cout.flush() ? code : report(reason_name(Reason::write_failed), kUnwritable);
  } catch (const CLI::ParseError& error) {
    return report_usage(app, error.what());
  }
  watch_for_interrupts();
  return guard(app, commands);
}
