// The command `fourmoe`: exit code 0 on success alone, 1 on failure, 2 on wrong usage; errors are one line on stderr.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <new>

#include "backends/list.h"
#include "command.h"
#include "describe.h"
#include "flow.h"
#include "progress.h"
#include "status.h"

namespace fourmoe::tools {

std::vector<std::string> backend_names() {
  std::vector<std::string> names = {"auto"};
  for (const Step* step : backends::list()) {
    const std::string room(step->room);
    if (room != "host" && std::find(names.begin(), names.end(), room) == names.end()) names.push_back(room);
  }
  return names;
}

void add_backend(CLI::App* app, std::string* backend) {
  app->add_option("--backend", *backend, "which room computes")
      ->check(CLI::IsMember(backend_names()))
      ->capture_default_str();
}

void add_precision(CLI::App* app, std::string* precision) {
  app->add_option("--precision", *precision, "w4a16: activations stay 16-bit; w4a4: they are quantised to NVFP4")
      ->check(CLI::IsMember({"w4a16", "w4a4"}))
      ->capture_default_str();
}

void add_threads(CLI::App* app, int* threads) {
  app->add_option("--threads", *threads, "threads to use; 0 for all that the machine offers")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
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

int report(std::string_view reason, std::string line) {
  std::replace(line.begin(), line.end(), '\n', ' ');
  fmt::print(stderr, "fourmoe: {}: {}\n", reason, line);
  return kFailure;
}

int report_usage(const CLI::App& app, const CLI::ParseError& error) {
  std::string command = "fourmoe";
  for (const CLI::App* used : app.get_subcommands()) command += " " + used->get_name();
  std::string line = error.what();
  std::replace(line.begin(), line.end(), '\n', ' ');
  fmt::print(stderr, "fourmoe: {}; see {} --help\n", line, command);
  return kUsage;
}

int run(const std::vector<Command>& commands) {
  for (const Command& command : commands) {
    if (!command.app->parsed()) continue;
    const int code = command.run();
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
      throw Error(Reason::write_failed, "standard output cannot be written");
    }
    return code;
  }
  return kUsage;
}

int guard(const std::vector<Command>& commands) {
  try {
    return run(commands);
  } catch (const CLI::ParseError& error) {  // options that contradict each other
    fmt::print(stderr, "fourmoe: {}; see fourmoe --help\n", error.what());
    return kUsage;
  } catch (const Interrupted&) {
    return report("interrupted", "stopped; nothing was written");
  } catch (const Error& error) {
    return report(reason_name(error.reason()), error.what());
  } catch (const std::bad_alloc&) {
    return report(reason_name(Reason::out_of_memory), "an allocation failed");
  } catch (const std::exception& error) {
    return report(reason_name(Reason::internal), error.what());
  }
}

}  // namespace
}  // namespace fourmoe::tools

int main(int argc, char** argv) {
  using namespace fourmoe::tools;
  CLI::App app{"fourmoe: Mixture-of-Experts layers on 4-bit NVFP4 weights", "fourmoe"};
  app.set_version_flag("--version", "fourmoe " FOURMOE_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  const std::vector<Command> commands = {add_inspect(app), add_run(app),   add_quantize(app), add_verify(app),
                                         add_explain(app), add_bench(app), add_support(app)};
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {  // --help and --version
    return app.exit(asked);
  } catch (const CLI::ParseError& error) {
    return report_usage(app, error);
  }
  watch_for_interrupts();
  return guard(commands);
}
