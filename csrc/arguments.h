// Checks of arguments, for the operators and for the NumPy half alike.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace bitkernels {

// Messages are put together without streams: those format numbers through the locale of whichever C++
// runtime was loaded first, which need not be the one this library was built with.
inline const std::string& to_text(const std::string& part) { return part; }
inline std::string to_text(double part) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", part);
  return digits;
}
template <std::integral T>
std::string to_text(T part) {
  return std::to_string(part);
}

// Prints and compares as [2, 3]; Sizes is any sequence of integers. A check that holds formats nothing.
template <typename Sizes>
struct Shape {
  Sizes sizes;

  template <typename Other>
  bool operator==(const Shape<Other>& other) const {
    return std::equal(sizes.begin(), sizes.end(), other.sizes.begin(), other.sizes.end());
  }
  friend std::string to_text(const Shape& shape) {
    std::string out = "[";
    for (int64_t size : shape.sizes) out += (out.size() > 1 ? ", " : "") + std::to_string(size);
    return out + "]";
  }
};
template <typename Sizes>
Shape(Sizes) -> Shape<Sizes>;

// Python sees a ValueError with this message, which names the operator, the argument and the value found.
template <typename... Parts>
void check_argument(bool holds, const Parts&... parts) {
  if (holds) return;
  throw std::invalid_argument((std::string() + ... + to_text(parts)));
}

// w_packed must hold rows of K weights; words fix K up to padding.
template <typename Sizes>
void check_packed_shape(const char* op, const Sizes& w_packed, int64_t K, int64_t per_word) {
  check_argument(w_packed.size() == 2, op, ": w_packed must be [N, ceil(K/", per_word, ")], got ", Shape{w_packed});
  check_argument(w_packed[1] == ceil_div(K, per_word), op, ": w_packed must have ceil(K/", per_word,
                 ") = ", ceil_div(K, per_word), " words a row for K = ", K, ", got ", w_packed[1]);
}

template <typename Sizes>
ScaleAxis scale_axis(const char* op, const Sizes& alpha, int64_t N, int64_t K) {
  const size_t dim = alpha.size();
  if (dim == 1 && alpha[0] == K) return ScaleAxis::kColumn;
  if (dim == 2 && alpha[0] == 1 && alpha[1] == K) return ScaleAxis::kColumn;
  if (dim == 2 && alpha[0] == N && alpha[1] == 1) return ScaleAxis::kRow;
  check_argument(dim == 0 || (dim == 1 && alpha[0] == 1), op, ": alpha must be of shape [", K, "] or [1, ", K,
                 "] (column), [", N, ", 1] (row) or [1] (single), got ", Shape{alpha});
  return ScaleAxis::kSingle;
}

}  // namespace bitkernels
