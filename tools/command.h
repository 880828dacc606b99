// Command: one subcommand of `fourmoe`, a file each. main.cc parses, runs the one that was named and reports errors.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <vector>

#include "format/number.h"

namespace fourmoe::tools {

struct Command {
  CLI::App* app = nullptr;
  std::function<int()> run;  // returns the exit code; throws Error
};

// Exit codes of the command.
inline constexpr int kSuccess = 0;
inline constexpr int kFailure = 1;
inline constexpr int kUsage = 2;

Command add_inspect(CLI::App& app);
Command add_run(CLI::App& app);
Command add_quantize(CLI::App& app);
Command add_verify(CLI::App& app);
Command add_explain(CLI::App& app);
Command add_bench(CLI::App& app);
Command add_tune(CLI::App& app);
Command add_support(CLI::App& app);

// "auto" and the rooms of backends/list.cc, for --backend.
std::vector<std::string> backend_names();

// Refuses what is not a number from `least` to `most`, in one readable line.
CLI::Validator within(f64 least, f64 most);

// Options that several commands have, with the same words and checks everywhere.
void add_backend(CLI::App* app, std::string* backend);
void add_precision(CLI::App* app, std::string* precision);
void add_threads(CLI::App* app, int* threads);
void add_device(CLI::App* app, std::string* device);

// The device meant by --device and --backend: a GPU's backend means cuda:0 where no device was given ("").
i32 device_of(const std::string& device, const std::string& backend);
CLI::Option* add_layer(CLI::App* app, int* layer, const std::string& description);
CLI::Option* add_shape(CLI::App* app, std::string* shape);

}  // namespace fourmoe::tools
