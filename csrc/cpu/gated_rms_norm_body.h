// RMSNorm(x * silu(z)) * weight and its gradient for one instruction set.
#pragma once

#include "mixer_vector.h"

namespace bitkernels::cpu {
namespace {

// scratch: group_size elements of acc, padded to vectors.
template <typename E, typename T>
void norm_rows(const GatedRmsNorm& p, int64_t begin, int64_t end, void* scratch) {
  T* gated = static_cast<T*>(scratch);
  const int64_t size = p.group_size;
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t start = 0; start < p.width; start += size) {
      const E* x = static_cast<const E*>(p.x) + m * p.x_row + start;
      const E* z = static_cast<const E*>(p.z) + m * p.z_row + start;
      E* out = static_cast<E*>(p.out) + m * p.width + start;
      Vec<T> squares{};
      for (int64_t i = 0; i < size; i += kLanes<T>) {
        const Vec<T> value = load(x + i, size - i) * silu(load(z + i, size - i));
        store(gated + i, value);
        squares += value * value;
      }
      const T scale = T(1) / T(::sqrt(sum_lanes(squares) / T(size) + T(p.eps)));
      for (int64_t i = 0; i < size; i += kLanes<T>) {
        store(out + i, load(gated + i) * scale * load(weight + start + i, size - i), size - i);
      }
    }
  }
}

// With u = x silu(z) and r = 1 / rms(u): du = r (w dy) - u r^3 mean(w dy u). Adds these rows' dweight to `dweight`.
template <typename E, typename T>
void norm_rows_backward(const GatedRmsNormBackward& g, int64_t begin, int64_t end, void* partial) {
  const GatedRmsNorm& p = g.forward;
  const int64_t size = p.group_size;
  const T* weight = static_cast<const T*>(p.weight);
  T* dweight = static_cast<T*>(partial);
  for (int64_t i = 0; i < p.width; ++i) dweight[i] = 0;
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t start = 0; start < p.width; start += size) {
      const E* x = static_cast<const E*>(p.x) + m * p.x_row + start;
      const E* z = static_cast<const E*>(p.z) + m * p.z_row + start;
      const E* dy = static_cast<const E*>(g.dy) + m * g.dy_row + start;
      Vec<T> squares{}, products{};
      for (int64_t i = 0; i < size; i += kLanes<T>) {
        const Vec<T> u = load(x + i, size - i) * silu(load(z + i, size - i));
        squares += u * u;
        products += u * load(dy + i, size - i) * load(weight + start + i, size - i);
      }
      const T scale = T(1) / T(::sqrt(sum_lanes(squares) / T(size) + T(p.eps)));
      const T pull = scale * scale * scale * (sum_lanes(products) / T(size));
      E* dx = static_cast<E*>(g.dx) + m * p.width + start;
      E* dz = static_cast<E*>(g.dz) + m * p.width + start;
      for (int64_t i = 0; i < size; i += kLanes<T>) {
        const int64_t count = size - i;
        const Vec<T> value = load(x + i, count), gate = load(z + i, count), s = sigmoid(gate);
        const Vec<T> grad = load(dy + i, count), u = value * gate * s;
        const Vec<T> du = grad * load(weight + start + i, count) * scale - u * pull;
        store(dx + i, du * gate * s, count);
        store(dz + i, du * value * silu_slope(gate, s), count);
        store(dweight + start + i, load(dweight + start + i, count) + grad * u * scale, count);
      }
    }
  }
}

template <typename T>
void norm_sum_blocks(const GatedRmsNormBackward& g, int64_t blocks, int64_t begin, int64_t end) {
  const T* partial = static_cast<const T*>(g.workspace);
  T* dweight = static_cast<T*>(g.dweight);
  for (int64_t i = begin; i < end; ++i) {
    T sum = 0;
    for (int64_t j = 0; j < blocks; ++j) sum += partial[j * g.forward.width + i];
    dweight[i] = sum;
  }
}

}  // namespace
}  // namespace bitkernels::cpu
