// Packed weights as the kernels read them: panels of kPanelRows rows, transposed so that word w of all of
// them lies together, panel[w * kPanelRows + r], and a register of words holds as many rows.
#pragma once

#include "kernels.h"

namespace bitkernels::cpu {

constexpr int kPanelRows = 64;

using PanelTranspose = void (*)(const uint32_t* const* rows, int64_t words, uint32_t* panel);

// Defined in panel_<path>.cpp, to be called on machines with that instruction set alone.
void transpose_panel_avx2(const uint32_t* const* rows, int64_t words, uint32_t* panel);
void transpose_panel_avx512(const uint32_t* const* rows, int64_t words, uint32_t* panel);

// The function for the path in use.
PanelTranspose panel_transpose();

// Rows n0 to n0 + kPanelRows of w [N, words]; the last row stands in for rows beyond N.
void load_panel(PanelTranspose transpose, const uint32_t* w, int64_t N, int64_t words, int64_t n0, uint32_t* panel);

}  // namespace bitkernels::cpu
