#include "checkpoint/checkpoint.h"

#include "checkpoint/source.h"
#include "status.h"

namespace fourmoe::checkpoint {

struct Checkpoint::Impl {
  std::unique_ptr<LayerSource> source;
};

namespace {

namespace fs = std::filesystem;

std::unique_ptr<LayerSource> open_source(const fs::path& path) {
  const fs::file_status status = fs::status(path);
  if (!fs::exists(status)) throw Error(Reason::file_unreadable, path.string() + ": does not exist");
  const std::string ending = path.extension().string();
  if (fs::is_directory(status) || ending == ".safetensors") return open_safetensors(path);
  if (ending == ".gguf") return open_gguf(path);
  throw Error(Reason::file_unreadable, path.string() + ": neither a folder, a .safetensors nor a .gguf file");
}

}  // namespace

Checkpoint Checkpoint::open(const fs::path& path) {
  try {
    const auto impl = std::make_shared<Impl>();
    impl->source = open_source(path);
    return Checkpoint(impl);
  } catch (const fs::filesystem_error& error) {
    throw Error(Reason::file_unreadable, path.string() + ": " + error.code().message());
  }
}

std::vector<i32> Checkpoint::layers() const { return impl_->source->layers(); }
Info Checkpoint::inspect() const { return impl_->source->inspect(); }
const TensorMap& Checkpoint::tensors() const { return impl_->source->tensors(); }
Layer Checkpoint::load(i32 layer, Executor& executor) const { return impl_->source->load(layer, executor); }

}  // namespace fourmoe::checkpoint
