#include "backends/sm90/whole_launch.cuh"

namespace fourmoe::sm90 {

Status launch_by_pick(int tile, const Whole& call, i32 multiprocessors, void* stream) {
  return launch_shape<true>(tile, call, multiprocessors, stream);
}

}  // namespace fourmoe::sm90
