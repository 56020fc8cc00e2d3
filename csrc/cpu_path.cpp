// cpu_path: which instruction set the CPU kernels use.
#include "cpu/cpu_features.h"
#include "op.h"

namespace bitkernels {
namespace {

std::string cpu_path(const std::optional<std::string>& force) {
  if (force) cpu::force_path(force->c_str());
  return cpu::kPathNames[static_cast<int>(cpu::path())];
}

}  // namespace
}  // namespace bitkernels

// It takes no tensor whose device could choose an implementation.
STABLE_TORCH_LIBRARY_IMPL(bitkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_path", TORCH_BOX(&bitkernels::cpu_path));
}
