#include "kernels.h"
namespace bitkernels::cuda {
int64_t packed_linear_workspace(const PackedLinear&) { return 0; }
void packed_linear(const PackedLinear&, Executor) {}
}
