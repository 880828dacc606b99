// Table: rows of text in aligned columns.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace fourmoe::tools {

// Control characters as \xNN: names come from files of others and go to a terminal.
std::string printable(std::string_view text);

class Table {
 public:
  // A header that starts with '>' makes its column right-aligned.
  explicit Table(const std::vector<std::string>& headers);

  void add(std::vector<std::string> cells);  // as many as headers
  bool empty() const { return rows_.empty(); }
  std::string text() const;      // columns two spaces apart, one line a row
  std::string markdown() const;  // a table of GitHub's Markdown

 private:
  std::vector<std::string> headers_;
  std::vector<bool> right_;
  std::vector<std::vector<std::string>> rows_;
};

// Lines "name   value", the values in one column.
class Facts {
 public:
  void add(std::string name, std::string_view value);
  std::string text() const;

 private:
  std::vector<std::pair<std::string, std::string>> lines_;
};

}  // namespace fourmoe::tools
