#include "cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace bitkernels::cpu {
namespace {

constexpr int kDefault = -1;
std::atomic<int> forced{kDefault};

Path parse(const std::string& source, const std::string& name) {
  for (Path candidate : {Path::kPortable, Path::kAvx2, Path::kAvx512}) {
    if (name != kPathNames[static_cast<int>(candidate)]) continue;
    if (candidate > supported_path()) {
      throw std::invalid_argument(source + " asks for " + name + ", which this machine does not support; its best is " +
                                  kPathNames[static_cast<int>(supported_path())]);
    }
    return candidate;
  }
  throw std::invalid_argument(source + " must be portable, avx2 or avx512, got " + name);
}

Path default_path() {
  const char* name = std::getenv("BITKERNELS_CPU");
  return name && *name ? parse("BITKERNELS_CPU", name) : supported_path();
}

}  // namespace

Path supported_path() {
#if defined(__x86_64__)
  static const Path best = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
      return Path::kPortable;
    }
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    return avx512 ? Path::kAvx512 : Path::kAvx2;
  }();
  return best;
#else
  return Path::kPortable;
#endif
}

Path path() {
  const int chosen = forced.load(std::memory_order_relaxed);
  if (chosen != kDefault) return static_cast<Path>(chosen);
  static const Path initial = default_path();
  return initial;
}

void force_path(const char* name) {
  forced.store(*name ? static_cast<int>(parse("the CPU path", name)) : kDefault, std::memory_order_relaxed);
}

}  // namespace bitkernels::cpu
