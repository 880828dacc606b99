#include "checkpoint/mapped_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "status.h"

namespace fourmoe::checkpoint {
namespace {

[[noreturn]] void refuse_file(const std::filesystem::path& path, std::string_view what, int error) {
  throw Error(Reason::file_unreadable, fmt::format("{}: {}: {}", path.string(), what, std::strerror(error)));
}

}  // namespace

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path) {
  std::shared_ptr<MappedFile> file(new MappedFile);
  file->path_ = path;
  // O_NONBLOCK: a pipe put in a file's place must not hang the open.
  file->descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file->descriptor_ < 0) refuse_file(path, "cannot be opened", errno);
  struct stat facts {};
  if (::fstat(file->descriptor_, &facts) != 0) refuse_file(path, "cannot be examined", errno);
  if (S_ISDIR(facts.st_mode)) refuse_file(path, "cannot be read", EISDIR);
  if (!S_ISREG(facts.st_mode)) throw Error(Reason::file_unreadable, path.string() + ": not a regular file");
  file->size_ = facts.st_size;
  if (file->size_ == 0) return file;
  void* address = ::mmap(nullptr, static_cast<std::size_t>(file->size_), PROT_READ, MAP_SHARED, file->descriptor_, 0);
  if (address == MAP_FAILED) refuse_file(path, "cannot be mapped", errno);
  file->data_ = static_cast<const u8*>(address);
  return file;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<u8*>(data_), static_cast<std::size_t>(size_));
  if (descriptor_ >= 0) ::close(descriptor_);
}

void MappedFile::read(i64 offset, i64 bytes, void* out) const {
  if (offset < 0 || bytes < 0 || offset > size_ - bytes) {
    throw Error(Reason::file_malformed, fmt::format("{}: {} bytes at offset {} lie outside the file of {} bytes",
                                                    path_.string(), bytes, offset, size_));
  }
  u8* to = static_cast<u8*>(out);
  while (bytes > 0) {
    const ssize_t got = ::pread(descriptor_, to, static_cast<std::size_t>(bytes), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) refuse_file(path_, "cannot be read", errno);
    if (got == 0) throw Error(Reason::file_unreadable, path_.string() + ": became shorter while it was read");
    to += got;
    offset += got;
    bytes -= got;
  }
}

std::string quote(std::string_view name) {
  constexpr std::size_t kLongest = 200;
  std::string text = "\"";
  for (const char c : name.substr(0, kLongest)) {
    const u8 byte = static_cast<u8>(c);
    if (byte < 0x20 || byte == 0x7f) text += fmt::format("\\x{:02x}", byte);
    else text += c;
  }
  if (name.size() > kLongest) text += "...";
  return text + "\"";
}

}  // namespace fourmoe::checkpoint
