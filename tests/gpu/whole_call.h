// A call of the one launch itself, over memory of the test's: it waits for ten milliseconds, not for twenty seconds.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "backends/sm90/whole.h"
#include "case.h"
#include "gpu/fault.h"
#include "gpu/runtime.h"
#include "machine.h"
#include "memory.h"
#include "weights/device_packed.h"

namespace fourmoe::testing {

class WholeCall {
 public:
  explicit WholeCall(i32 tokens, Precision precision = Precision::w4a16) {
    spec_.problem = cases::problem(256, 96, 16, 4);
    spec_.problem.precision = precision;
    spec_.problem.max_tokens = spec_.tokens = tokens;
    weights_ = cases::random_layer(spec_.problem, 1, false);
    spec_.problem = weights_.problem;
    spec_.problem.max_tokens = tokens;
    packed_ =
        std::make_unique<weights::DevicePacked>(spec_.problem, weights_.experts, sm90::kPacking, 0, tbb_executor());
    const Problem& p = spec_.problem;
    work_ = std::make_shared<Work>(Work{DeviceVector<i32>(std::vector<i32>(shape().words(), 0)),
                                        DeviceVector<u16>(i64{sm90::most_hits(p)} * sm90::kHitTokens * p.hidden),
                                        DeviceVector<u16>(i64{sm90::most_hits(p)} * sm90::kHitTokens * p.inter),
                                        DeviceVector<f32>(i64{sm90::most_rows(p)} * p.hidden)});
    ids_out_ = DeviceVector<i32>(i64{tokens} * p.top_k);
    picks_out_ = DeviceVector<f32>(i64{tokens} * p.top_k);
    output_ = DeviceVector<f32>(i64{tokens} * p.hidden);
    throw_unless_ok(gpu::Buffer::make(gpu::Kind::pinned, sizeof(gpu::Fault), "fault", &fault_));
    forget_fault();
    route(spec_);
  }

  // Other tokens and picks from the next call on.
  void route(const cases::Spec& spec) {
    const cases::Call call(spec);
    hidden_ = DeviceVector<u8>(call.hidden);
    ids_ = DeviceVector<i32>(call.ids);
    picks_ = DeviceVector<f32>(call.weights);
  }

  // Works from the next call on where the other does, as calls of one workspace.
  void share_work(const WholeCall& other) { work_ = other.work_; }

  // Enqueues.
  void launch(gpu::Stream stream) const {
    const Problem& p = spec_.problem;
    const i32 tokens = spec_.tokens;
    using format::Dtype;
    sm90::Whole whole;
    whole.slots.problem = p;
    whole.slots.tokens = tokens;
    whole.slots.in.ids = {ids_.data(), Dtype::i32, tokens, p.top_k, p.top_k};
    whole.slots.in.weights = {picks_.data(), Dtype::f32, tokens, p.top_k, p.top_k};
    whole.slots.out.ids = ids_out_.data();
    whole.slots.out.weights = picks_out_.data();
    whole.slots.fault = fault_.as<gpu::Fault>();
    whole.hidden = {hidden_.data(), Dtype::bf16, tokens, p.hidden, p.hidden};
    whole.table = &packed_->table();
    whole.work.queue = work_->queue.data();
    whole.work.rows = work_->rows.data();
    whole.work.y = work_->y.data();
    whole.work.z = work_->z.data();
    whole.sum.tokens = tokens;
    whole.sum.hidden = p.hidden;
    whole.sum.top_k = p.top_k;
    whole.sum.out.output = {output_.data(), Dtype::f32, tokens, p.hidden, p.hidden};
    whole.tile = tokens <= sm90::kHitTokens ? sm90::kWholeTile : sm90::kWholeTile + 1;  // the first splits K
    whole.wait_cycles = 20'000'000;  // other processes of a host stop a GPU for 2 ms
    throw_unless_ok(sm90::launch(whole, machine().devices[0].sms, stream));
  }

  std::vector<f32> run() const {
    launch(nullptr);
    throw_unless_ok(gpu::synchronise(nullptr));
    return output_.download();
  }

  const cases::Spec& spec() const { return spec_; }
  const DeviceVector<i32>& queue() const { return work_->queue; }
  const DeviceVector<f32>& output() const { return output_; }
  static gpu::QueueShape shape() { return sm90::queue_shape(machine().devices[0].sms); }
  Status fault() const { return gpu::to_status(*fault_.as<gpu::Fault>()); }
  void forget_fault() { new (fault_.data()) gpu::Fault; }

 private:
  struct Work {
    DeviceVector<i32> queue;
    DeviceVector<u16> rows;  // of w4a4
    DeviceVector<u16> y;
    DeviceVector<f32> z;
  };

  cases::Spec spec_;
  checkpoint::Layer weights_;
  std::unique_ptr<weights::DevicePacked> packed_;
  std::shared_ptr<Work> work_;
  DeviceVector<i32> ids_, ids_out_;
  DeviceVector<f32> picks_, picks_out_, output_;
  DeviceVector<u8> hidden_;
  gpu::Buffer fault_;
};

}  // namespace fourmoe::testing
