// bitkernels.host: the CPU kernels on NumPy arrays, without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <thread>
#include <vector>

#include "arguments.h"
#include "cpu/cpu_features.h"

namespace py = pybind11;

namespace bitkernels {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Words = py::array_t<uint32_t, py::array::c_style>;

std::vector<int64_t> sizes(const py::array& a) { return {a.shape(), a.shape() + a.ndim()}; }

// The array as dense memory of exactly this type: nothing is converted silently.
template <typename T>
py::array_t<T, py::array::c_style> dense(const char* op, const char* argument, const py::array& a, const char* type) {
  check_argument(py::isinstance<py::array_t<T>>(a), op, ": ", argument, " must be ", type, ", got ",
                 py::str(a.dtype()).cast<std::string>());
  return py::array_t<T, py::array::c_style>::ensure(a);
}

Floats floats(const char* op, const char* argument, const py::array& a) {
  return dense<float>(op, argument, a, "float32");
}

Words packed_words(const char* op, const py::array& w_packed, int64_t K, int64_t per_word) {
  check_argument(K >= 0, op, ": K must not be negative, got ", K);
  const Words words = dense<uint32_t>(op, "w_packed", w_packed, "uint32");
  check_packed_shape(op, sizes(words), K, per_word);
  return words;
}

std::optional<Floats> optional_bias(const char* op, const std::optional<py::array>& bias, int64_t N) {
  if (!bias) return std::nullopt;
  check_argument(sizes(*bias) == std::vector<int64_t>{N}, op, ": bias must be of shape [", N, "], got ",
                 Shape{sizes(*bias)});
  return floats(op, "bias", *bias);
}

const float* data_or_null(const std::optional<Floats>& a) { return a ? a->data() : nullptr; }

int64_t width(const char* op, const Floats& x) {
  check_argument(x.ndim() >= 1, op, ": x must have at least one dimension");
  return x.shape(x.ndim() - 1);
}

Floats empty_like_with_last(const Floats& x, int64_t last) {
  std::vector<int64_t> shape = sizes(x);
  shape.back() = last;
  return Floats(shape);
}

int64_t rows(const Floats& x) {
  int64_t n = 1;
  for (py::ssize_t i = 0; i + 1 < x.ndim(); ++i) n *= x.shape(i);
  return n;
}

// Runs ranges of equal length on threads of their own, the last one on the caller's.
ParallelFor threads(const char* op, std::optional<int64_t> num_threads) {
  check_argument(!num_threads || *num_threads >= 1, op, ": num_threads must be positive, got ",
                 num_threads.value_or(0));
  const int64_t limit = num_threads.value_or(std::max(1u, std::thread::hardware_concurrency()));
  return [limit](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
    const int64_t count = std::min(limit, ceil_div(n, std::max<int64_t>(grain, 1)));
    if (count <= 0) return;
    const int64_t step = ceil_div(n, count);
    std::vector<std::jthread> workers;
    int64_t begin = 0;
    for (; begin + step < n; begin += step) workers.emplace_back(std::cref(f), begin, begin + step);
    f(begin, n);
  };
}

template <typename Kernel>
Words pack(const char* op, const py::array& w, int64_t per_word, const Kernel& kernel) {
  check_argument(w.ndim() == 2, op, ": w must be [N, K], got ", Shape{sizes(w)});
  const Floats dense = floats(op, "w", w);
  const int64_t N = w.shape(0), K = w.shape(1);
  Words packed({N, ceil_div(K, per_word)});
  uint32_t* out = packed.mutable_data();
  const float* in = dense.data();
  const py::gil_scoped_release release;
  kernel(in, DType::kFloat32, out, N, K, threads(op, std::nullopt));
  return packed;
}

template <typename Kernel>
Floats unpack(const char* op, const py::array& w_packed, int64_t K, int64_t per_word, const Kernel& kernel) {
  const Words words = packed_words(op, w_packed, K, per_word);
  const int64_t N = words.shape(0);
  Floats w({N, K});
  float* out = w.mutable_data();
  const uint32_t* in = words.data();
  const py::gil_scoped_release release;
  kernel(in, out, DType::kFloat32, N, K, threads(op, std::nullopt));
  return w;
}

Floats packed_linear(const py::array& x, const py::array& w_packed, const py::array& alpha, const py::array& beta,
                     const std::optional<py::array>& bias, std::optional<int64_t> num_threads) {
  constexpr const char* op = "packed_linear";
  const Floats xd = floats(op, "x", x), ad = floats(op, "alpha", alpha), bd = floats(op, "beta", beta);
  const int64_t K = width(op, xd);
  const Words wd = packed_words(op, w_packed, K, kSignsPerWord);
  const int64_t N = wd.shape(0);
  const ScaleAxis axis = scale_axis(op, sizes(ad), N, K);
  check_argument(sizes(bd) == sizes(ad), op, ": beta must have alpha's shape ", Shape{sizes(ad)}, ", got ",
                 Shape{sizes(bd)});
  const std::optional<Floats> bias_d = optional_bias(op, bias, N);
  const ParallelFor run = threads(op, num_threads);
  Floats y = empty_like_with_last(xd, N);
  const cpu::PackedLinear args{
      .x = xd.data(),
      .w_packed = wd.data(),
      .alpha = ad.data(),
      .beta = bd.data(),
      .bias = data_or_null(bias_d),
      .y = y.mutable_data(),
      .workspace = nullptr,
      .dtype = DType::kFloat32,
      .axis = axis,
      .M = rows(xd),
      .N = N,
      .K = K,
  };
  const py::gil_scoped_release release;
  cpu::packed_linear(args, run);
  return y;
}

Floats ternary_linear(const py::array& x, const py::array& w_packed, float scale, const std::optional<py::array>& bias,
                      std::optional<int64_t> act_bits, std::optional<int64_t> num_threads) {
  constexpr const char* op = "ternary_linear";
  check_argument(!act_bits || *act_bits == 8, op, ": act_bits must be None or 8, got ", act_bits.value_or(0));
  const Floats xd = floats(op, "x", x);
  const int64_t K = width(op, xd);
  const Words wd = packed_words(op, w_packed, K, kTernaryPerWord);
  const int64_t N = wd.shape(0);
  const std::optional<Floats> bias_d = optional_bias(op, bias, N);
  const ParallelFor run = threads(op, num_threads);
  Floats y = empty_like_with_last(xd, N);
  const cpu::TernaryLinear args{
      .x = xd.data(),
      .w_packed = wd.data(),
      .scale = &scale,
      .bias = data_or_null(bias_d),
      .y = y.mutable_data(),
      .workspace = nullptr,
      .dtype = DType::kFloat32,
      .int8_activations = act_bits.has_value(),
      .M = rows(xd),
      .N = N,
      .K = K,
  };
  const py::gil_scoped_release release;
  cpu::ternary_linear(args, run);
  return y;
}

py::dict cpu_features() {
  std::vector<std::string> paths;
  for (int i = 0; i <= static_cast<int>(cpu::supported_path()); ++i) paths.push_back(cpu::kPathNames[i]);
  py::dict report;
  report["path"] = cpu::kPathNames[static_cast<int>(cpu::path())];
  report["supported_paths"] = paths;
  report["threads"] = std::max(1u, std::thread::hardware_concurrency());
#if defined(__x86_64__)
  report["avx2"] = __builtin_cpu_supports("avx2") != 0;
  report["fma"] = __builtin_cpu_supports("fma") != 0;
  report["f16c"] = __builtin_cpu_supports("f16c") != 0;
  report["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  report["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  report["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
  report["avx512dq"] = __builtin_cpu_supports("avx512dq") != 0;
  report["avx512vnni"] = __builtin_cpu_supports("avx512vnni") != 0;
  report["avx512vbmi"] = __builtin_cpu_supports("avx512vbmi") != 0;
#endif
  return report;
}

}  // namespace
}  // namespace bitkernels

PYBIND11_MODULE(host, m) {
  using namespace bitkernels;
  m.doc() =
      "The CPU kernels on NumPy arrays, without torch.\n\n"
      "Activations and scales are float32, packed weights uint32 (docs/format.md defines the layout). A wrong dtype "
      "or shape raises a ValueError that names the argument and what was found; nothing is converted silently.";

  m.def(
      "pack_sign", [](const py::array& w) { return pack("pack_sign", w, kSignsPerWord, cpu::pack_sign); }, py::arg("w"),
      "Packs w float32 [N, K] into uint32 [N, ceil(K/32)]: bit 1 where w >= 0, padding bits 0.");
  m.def(
      "unpack_sign",
      [](const py::array& w, int64_t K) { return unpack("unpack_sign", w, K, kSignsPerWord, cpu::unpack_sign); },
      py::arg("w_packed"), py::arg("K"), "Unpacks uint32 [N, ceil(K/32)] into float32 [N, K] of -1 and +1.");
  m.def(
      "pack_ternary",
      [](const py::array& w) {
        return pack("pack_ternary", w, kTernaryPerWord,
                    [](const void* w, DType dtype, uint32_t* w_packed, int64_t N, int64_t K, const ParallelFor& run) {
                      cpu::pack_ternary(w, nullptr, dtype, w_packed, N, K, run);
                    });
      },
      py::arg("w"),
      "Packs w float32 [N, K] into uint32 [N, ceil(K/16)]: 2-bit codes clip(round(w), -1, 1) + 1, padding code 1.");
  m.def(
      "unpack_ternary",
      [](const py::array& w, int64_t K) {
        return unpack("unpack_ternary", w, K, kTernaryPerWord, cpu::unpack_ternary);
      },
      py::arg("w_packed"), py::arg("K"), "Unpacks uint32 [N, ceil(K/16)] into float32 [N, K] of -1, 0 and +1.");
  m.def("packed_linear", &packed_linear, py::arg("x"), py::arg("w_packed"), py::arg("alpha"), py::arg("beta"),
        py::arg("bias") = py::none(), py::arg("num_threads") = py::none(),
        "y [..., N] = x [..., K] @ (alpha * S + beta)^T + bias, S [N, K] the signs in w_packed.\n\n"
        "alpha and beta are of shape [K] or [1, K] (column scales), [N, 1] (row) or [1] (single); bias is [N]. "
        "num_threads defaults to the number of CPUs.");
  m.def("ternary_linear", &ternary_linear, py::arg("x"), py::arg("w_packed"), py::arg("scale"),
        py::arg("bias") = py::none(), py::arg("act_bits") = py::none(), py::arg("num_threads") = py::none(),
        "y [..., N] = x [..., K] @ (scale * Q)^T + bias, Q [N, K] the ternary weights in w_packed.\n\n"
        "act_bits=8 quantises x to int8 per token and sums exactly in integers. num_threads defaults to the number "
        "of CPUs.");
  m.def("cpu_features", &cpu_features,
        "What the CPU supports, which paths can run here, and the path in use: portable, avx2 or avx512.");
  m.def(
      "force_cpu_path", [](const std::string& name) { cpu::force_path(name.c_str()); }, py::arg("name"),
      "Makes the kernels of this module use the named path; '' chooses the best one, or BITKERNELS_CPU, again.");
}
