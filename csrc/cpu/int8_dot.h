// Dot products of ternary codes and int8 activations, exact in int32.
//
// Byte b of plane j of a word, (word >> 2 j) & 0x03030303, is code 4 b + j, so the activations of a word
// are stored in that order: q[16 i + 4 j + b] = activation 16 i + 4 b + j. Codes 0 to 2 stand for weights
// -1 to 1; the caller subtracts the sum of the activations.
#pragma once

#include "kernels.h"
#include "panel.h"

namespace bitkernels::cpu {

constexpr uint32_t kPlaneMask = 0x03030303u;  // the lowest code of every byte
constexpr int kPlanes = 4;

struct Int8Kernels {
  LoadChunk load;
  // dots[t * kPanelRows + r] += sum of code * activation over a chunk of `words` words of row r, for each token;
  // the activations of a token are q_stride apart.
  void (*accumulate)(const uint32_t* chunk, int words, const int8_t* q, int64_t q_stride, int64_t tokens,
                     int32_t* dots);
  const char* name;  // as explain() tells it
};

// Defined in int8_dot_<path>.cpp, to be called on machines with that instruction set alone.
extern const Int8Kernels int8_dot_avx2;
extern const Int8Kernels int8_dot_avx512;

// The kernels for the path in use.
const Int8Kernels& int8_kernels();

}  // namespace bitkernels::cpu
