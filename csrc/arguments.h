// Checks of arguments, for the operators and for the NumPy half alike.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

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

// Sizes: any vector of integers.
template <typename Sizes>
std::string to_string(const Sizes& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

// w_packed must hold rows of K weights; words fix K up to padding.
template <typename Sizes>
void check_packed_shape(const char* op, const Sizes& w_packed, int64_t K, int64_t per_word) {
  check_argument(w_packed.size() == 2, op, ": w_packed must be [N, ceil(K/", per_word, ")], got ",
                 to_string(w_packed));
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
                 "] (column), [", N, ", 1] (row) or [1] (single), got ", to_string(alpha));
  return ScaleAxis::kSingle;
}

}  // namespace bitkernels
