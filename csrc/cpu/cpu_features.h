// Which instruction sets this machine has, and which of them the kernels use.
#pragma once

namespace bitkernels::cpu {

// Ordered: each path implies the ones before it.
enum class Path { kPortable, kAvx2, kAvx512 };

constexpr const char* kPathNames[] = {"portable", "avx2", "avx512"};

// The best path of this machine.
Path supported_path();

// The path in use: the best one, unless the environment variable BITKERNELS_CPU or force_path() named another.
// Throws std::invalid_argument where BITKERNELS_CPU names no path of this machine.
Path path();

// Makes path() return the named path from now on, "" the default one again. Throws std::invalid_argument
// where the name is not a path or the machine does not support it.
void force_path(const char* name);

}  // namespace bitkernels::cpu
