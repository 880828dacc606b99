#include "backends/list.h"

#include <array>

namespace fourmoe {

namespace route {
extern const Step kHostStep;
extern const Step kDeviceStep;
}  // namespace route
namespace combine {
extern const Step kHostStep;
extern const Step kDeviceStep;
}  // namespace combine
namespace sm90 {
extern const Step kGemm1;
extern const Step kGemm2;
}  // namespace sm90
namespace cpu {
extern const Step kGemm1;
extern const Step kGemm2;
}  // namespace cpu
namespace reference {
extern const Step kGemm1;
extern const Step kGemm2;
extern const Step kWhole;
}  // namespace reference

namespace backends {

std::span<const Step* const> list() {
  static constexpr std::array<const Step*, 11> kSteps = {
      &route::kDeviceStep, &sm90::kGemm1,      &sm90::kGemm2,      &combine::kDeviceStep,
      &route::kHostStep,   &cpu::kGemm1,       &cpu::kGemm2,       &combine::kHostStep,
      &reference::kGemm1,  &reference::kGemm2, &reference::kWhole,
  };
  return kSteps;
}

}  // namespace backends
}  // namespace fourmoe
