#include "table.h"

#include <fmt/format.h>

#include <algorithm>

namespace fourmoe::tools {
namespace {

std::string trimmed(std::string line) {
  line.erase(line.find_last_not_of(' ') + 1);
  return line + "\n";
}

}  // namespace

std::string printable(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) out += fmt::format("\\x{:02x}", byte);
    else out += c;
  }
  return out;
}

Table::Table(const std::vector<std::string>& headers) {
  for (const std::string& header : headers) {
    right_.push_back(header.starts_with('>'));
    headers_.push_back(header.substr(right_.back() ? 1 : 0));
  }
}

void Table::add(std::vector<std::string> cells) {
  cells.resize(headers_.size());
  for (std::string& cell : cells) cell = printable(cell);
  rows_.push_back(std::move(cells));
}

std::string Table::text() const {
  std::vector<std::size_t> widths;
  for (std::size_t c = 0; c < headers_.size(); ++c) {
    widths.push_back(headers_[c].size());
    for (const auto& row : rows_) widths[c] = std::max(widths[c], row[c].size());
  }
  const auto line = [&](const std::vector<std::string>& cells) {
    std::string out;
    for (std::size_t c = 0; c < cells.size(); ++c) {
      const std::string gap = c == 0 ? "" : "  ";
      out += right_[c] ? fmt::format("{}{:>{}}", gap, cells[c], widths[c])
                       : fmt::format("{}{:<{}}", gap, cells[c], widths[c]);
    }
    return trimmed(out);
  };
  std::string out = line(headers_);
  for (const auto& row : rows_) out += line(row);
  return out;
}

std::string Table::markdown() const {
  const auto line = [](const std::vector<std::string>& cells) {
    std::string out = "|";
    for (const std::string& cell : cells) out += fmt::format(" {} |", cell);
    return out + "\n";
  };
  std::string out = line(headers_);
  out += "|";
  for (const bool right : right_) out += right ? " ---: |" : " --- |";
  out += "\n";
  for (const auto& row : rows_) out += line(row);
  return out;
}

void Facts::add(std::string name, std::string_view value) { lines_.emplace_back(std::move(name), printable(value)); }

std::string Facts::text() const {
  std::size_t width = 0;
  for (const auto& [name, value] : lines_) width = std::max(width, name.size());
  std::string out;
  for (const auto& [name, value] : lines_) out += trimmed(fmt::format("{:<{}}  {}", name, width, value));
  return out;
}

}  // namespace fourmoe::tools
