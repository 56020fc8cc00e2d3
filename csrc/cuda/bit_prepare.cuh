// Activations become planes of bits, in the order in which bit_matmul.cuh brings them to the tensor cores.
#pragma once

#include <cfloat>

#include "bit_mma.cuh"
#include "bit_planes.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "step.cuh"
#include "tokens.cuh"

namespace bitkernels::cuda {

// What the fixed point of a token leaves out.
struct PlaneToken {
  float unit;  // of the fixed point; int8: the activation scale
  float plain;
  int sum[2];  // of each limb
};

// Planes lie [group of tokens][chunk of K][token of the group, plane], a chunk being 128 bits of a plane.
struct PlaneArgs {
  const void* x;
  const float* scale;  // [K] or null
  const float* shift;  // [K] or null
  uint8_t* planes;
  PlaneToken* tokens;
  int K, M;
  int chunks;      // of K, an even number
  int group_log2;  // tokens of a group
  bool has_plain;
  // kNorm alone.
  const float* norm;  // [K]
  float eps;
  Ahead weights;  // that the product reads
};

// A block a token; tokens past M are zero. It reads its row twice where the row is longer than the block.
//
// kNorm: an RMSNorm goes before, in a chain of kernels that overlap. Its weight is one more scale of the activations,
// its divisor a factor of the sums.
template <typename F, typename T, bool kVector, bool kNorm = false>
__global__ void __launch_bounds__(1024) prepare_planes_kernel(const __grid_constant__ PlaneArgs args) {
  using Format = FusedFormat<F, T>;
  constexpr int kLimbs = Format::kLimbs;
  constexpr int kPerLane = Format::kPerLane;
  constexpr int kPerStep = 32 * kPerLane;  // a warp's, two chunks
  constexpr bool kSigns = F::kPerWord == kSignsPerWord;
  __shared__ uint32_t most_scratch[32];
  __shared__ float plain_scratch[32], square_scratch[32];
  __shared__ int sum_scratch[kLimbs][32];
  if constexpr (!kNorm) let_next_kernel_start();

  const int m = blockIdx.x;
  const int lane = threadIdx.x % 32;
  const int warp = uniform(threadIdx.x / 32);
  const int warps = blockDim.x / 32;
  const int end = m < args.M ? args.K : 0;
  const T* row = static_cast<const T*>(args.x) + int64_t(min(m, args.M - 1)) * args.K;
  const int steps = args.chunks / kBitMmaChunks;
  const int group = m >> args.group_log2;
  const int of_group = m - (group << args.group_log2);
  const int64_t pitch = (int64_t(Format::kPlanes) << args.group_log2) * kChunkBytes;
  uint8_t* to = args.planes + group * args.chunks * pitch + (lane / 16) * pitch +
                (of_group * Format::kPlanes + lane % 4) * kChunkBytes + lane / 4 % 4 * 4;

  Run<kPerLane, T> x;
  Run<kPerLane, float> scale, shift, norm;
  const auto load_x = [&](int step) { x.template load<kVector>(row, step * kPerStep + lane * kPerLane, end); };
  const auto load_scales = [&](int step) {
    const int k = step * kPerStep + lane * kPerLane;
    if (kSigns && args.scale) scale.template load<kVector>(args.scale, k, end);
    if (kSigns && args.shift) shift.template load<kVector>(args.shift, k, end);
    if constexpr (kNorm) norm.template load<kVector>(args.norm, k, end);
  };
  // Parameters, unlike activations, are there before the kernel in front has ended.
  load_scales(warp);
  if constexpr (kNorm) {
    if (threadIdx.x == 0) prefetch_ahead(args.weights);
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  float v[kPerLane];
  uint32_t most = 0;
  float plain = 0.0f, square = 0.0f;
#pragma unroll 1
  for (int step = warp; step < steps; step += warps) {
    load_x(step);
    if (step > warp) load_scales(step);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      v[i] = x[i];
      if constexpr (kNorm) {
        square = fmaf(v[i], v[i], square);
        v[i] *= norm[i];
      }
      if (kSigns && args.has_plain) plain = args.shift ? fmaf(v[i], shift[i], plain) : plain + v[i];
      if (kSigns && args.scale) v[i] *= scale[i];
      most = max(most, __float_as_uint(fabsf(v[i])));  // as integers, NaN is the largest of all
    }
  }
  most = __reduce_max_sync(0xffffffff, most);
  if (lane == 0) most_scratch[warp] = most;
  __syncthreads();
  most = __reduce_max_sync(0xffffffff, lane < warps ? most_scratch[lane] : 0);
  const float absmax = __uint_as_float(most);
  const int exponent = step_exponent<Format::kBits>(absmax);
  const float per_unit = F::kInteger ? int8_scale(absmax) : power_of_two(-exponent);

  int sums[kLimbs] = {};
#pragma unroll 1
  for (int step = warp; step < steps; step += warps) {
    if (steps > warps) {
      load_x(step);
      load_scales(step);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        v[i] = kNorm ? x[i] * norm[i] : x[i];
        if (kSigns && args.scale) v[i] *= scale[i];
      }
    }
    uint32_t fixed[8];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t q = to_fixed<F, kLimbs>(v[i], per_unit);
      if constexpr (kLimbs == 1) {
        sums[0] += static_cast<int>(q << 16) >> 16;
      } else {
        sums[0] += static_cast<int>(q & 0xffff);
        sums[1] += static_cast<int>(q) >> 16;
      }
      if constexpr (kPerLane == 8) {
        fixed[i] = q;
      } else {
        fixed[2 * i] = q;
        fixed[2 * i + 1] = q << 1;
      }
    }
#pragma unroll
    for (int l = 0; l < kLimbs; ++l) {
      uint32_t plane[4];
      to_planes(fixed, l, plane);
      uint8_t* words = to + step * kBitMmaChunks * pitch + l * kPlanesPerLimb * kChunkBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) *reinterpret_cast<uint32_t*>(words + 4 * i * kChunkBytes) = plane[i];
    }
  }
  if (kSigns && args.has_plain) plain = warp_reduce(plain, Sum());
  if constexpr (kNorm) square = warp_reduce(square, Sum());
  if (lane == 0) plain_scratch[warp] = plain, square_scratch[warp] = square;
#pragma unroll
  for (int l = 0; l < kLimbs; ++l) {
    const int of_warp = __reduce_add_sync(0xffffffff, sums[l]);
    if (lane == 0) sum_scratch[l][warp] = of_warp;
  }
  __syncthreads();
  if (warp > 0) return;
  PlaneToken token{F::kInteger ? per_unit : power_of_two(exponent),
                   warp_reduce(lane < warps ? plain_scratch[lane] : 0.0f, Sum()),
                   {}};
  // Fixed point has no infinities: a token that holds one, or NaN, gives NaN.
  if (!F::kInteger && !(absmax <= FLT_MAX)) token.unit = NAN;
  if constexpr (kNorm) {
    square = warp_reduce(lane < warps ? square_scratch[lane] : 0.0f, Sum());
    const float inverse = rsqrtf(__fdividef(square, static_cast<float>(args.K)) + args.eps);
    token.unit *= inverse, token.plain *= inverse;
  }
#pragma unroll
  for (int l = 0; l < kLimbs; ++l) {
    token.sum[l] = __reduce_add_sync(0xffffffff, lane < warps ? sum_scratch[l][lane] : 0);
  }
  if (lane == 0) args.tokens[m] = token;
}

}  // namespace bitkernels::cuda
