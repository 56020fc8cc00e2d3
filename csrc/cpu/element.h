// Scalar types of tensors in memory and their conversions, which round to nearest even.
//
// Everything here has internal linkage: a file compiled for one instruction set must never lend its
// copy of a function to a file that runs on every machine.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace bitkernels::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

[[maybe_unused]] static inline float to_float(float v) { return v; }
[[maybe_unused]] static inline double to_float(double v) { return v; }
[[maybe_unused]] static inline float to_float(int8_t v) { return v; }
[[maybe_unused]] static inline float to_float(BFloat16 v) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(v.bits) << 16);
}
[[maybe_unused]] static inline float to_float(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  // The exponent moves from bias 15 to 127 by an exact multiplication, which serves subnormals as well.
  const float finite = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
  const uint32_t bits = magnitude < 0x7c00u ? __builtin_bit_cast(uint32_t, finite) : special;
  return __builtin_bit_cast(float, bits | sign);
}

[[maybe_unused]] static inline void from_float(float v, float& out) { out = v; }
[[maybe_unused]] static inline void from_float(double v, double& out) { out = v; }
[[maybe_unused]] static inline void from_float(float v, double& out) { out = v; }
[[maybe_unused]] static inline void from_float(float v, int8_t& out) { out = static_cast<int8_t>(v); }
[[maybe_unused]] static inline void from_float(float v, BFloat16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(v == v ? rounded : (bits >> 16) | 0x40u);
}
[[maybe_unused]] static inline void from_float(float v, Float16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is a subnormal: adding 0.5 puts its last bit at the last bit of the sum.
  const float small = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, small) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  if (magnitude >= 0x477ff000u) half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = static_cast<uint16_t>(half | sign);
}

// Calls f with a value of the element type.
template <typename F>
static inline void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
    case DType::kInt8: return f(int8_t{});
  }
}

}  // namespace bitkernels::cpu
