// Checks of arguments, for the operators and for the NumPy half alike.
#pragma once

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <sstream>
#include <stdexcept>

#include "kernels.h"

namespace bitkernels {

// Python sees a ValueError with this message, which names the operator, the argument and the value found.
template <typename... Parts>
void check_argument(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream out;
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

// Prints and compares as [2, 3]; Sizes is any sequence of integers. A check that holds formats nothing.
template <typename Sizes>
struct Shape {
  Sizes sizes;

  template <typename Other>
  bool operator==(const Shape<Other>& other) const {
    return std::equal(sizes.begin(), sizes.end(), other.sizes.begin(), other.sizes.end());
  }
  friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
    const char* separator = "";
    out << '[';
    for (int64_t size : shape.sizes) {
      out << separator << size;
      separator = ", ";
    }
    return out << ']';
  }
};
template <typename Sizes>
Shape(Sizes) -> Shape<Sizes>;

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
