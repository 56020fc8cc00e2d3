// How the scan and its backward are shared among threads.
#include "buffer.h"
#include "mixer_isa.h"
#include "ssd_scan_layout.h"

namespace bitkernels::cpu {
namespace {

// Calls f(sequence, chunk, group) in parallel for every chunk of every sequence.
template <typename F>
void for_each_tile(const SsdScan& p, Executor parallel_for, const F& f) {
  const Sequence& last = p.sequences[p.S - 1];
  const int64_t chunks = last.first_chunk + ssd_scan_chunks(last.length);
  parallel_for(chunks * p.G, 1, [&](int64_t begin, int64_t end) {
    int64_t s = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / p.G;
      while (chunk >= p.sequences[s].first_chunk + ssd_scan_chunks(p.sequences[s].length)) ++s;
      f(p.sequences[s], chunk - p.sequences[s].first_chunk, i % p.G);
    }
  });
}

}  // namespace

int64_t ssd_scan_chunks(int64_t length) { return ceil_div(length, kChunk); }

int64_t ssd_scan_workspace(const SsdScan& p) {
  const Sequence& last = p.sequences[p.S - 1];
  return (last.first_chunk + ssd_scan_chunks(last.length)) * p.G * ScanLayout(p).tile * acc_size(p.dtype);
}

void ssd_scan(const SsdScan& p, Executor parallel_for) {
  const MixerKernels& kernels = mixer_kernels(p.dtype);
  for_each_tile(p, parallel_for, [&](const Sequence& sequence, int64_t chunk, int64_t group) {
    kernels.scan_group_tiles(p, sequence, chunk, group);
  });
  parallel_for(p.S * p.H, 1, [&](int64_t begin, int64_t end) {
    const Buffer<char> memory(ScanLayout(p).forward_scratch() * acc_size(p.dtype));
    kernels.scan_heads(p, begin, end, memory.data);
  });
}

int64_t ssd_scan_backward_workspace(const SsdScanBackward& g) {
  return BackwardLayout(g).total * acc_size(g.forward.dtype);
}

void ssd_scan_backward(const SsdScanBackward& g, Executor parallel_for) {
  const SsdScan& p = g.forward;
  const MixerKernels& kernels = mixer_kernels(p.dtype);
  for_each_tile(p, parallel_for, [&](const Sequence& sequence, int64_t chunk, int64_t group) {
    kernels.scan_group_tiles(p, sequence, chunk, group);
  });
  int64_t longest = 0;
  for (int64_t s = 0; s < p.S; ++s) longest = p.sequences[s].length > longest ? p.sequences[s].length : longest;
  const int64_t blocks = HeadBlocks(p).count;
  parallel_for(p.S * p.G * blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer<char> memory(ScanLayout(p).backward_scratch(ssd_scan_chunks(longest)) * acc_size(p.dtype));
    for (int64_t i = begin; i < end; ++i) {
      kernels.scan_block_backward(g, i / blocks / p.G, i / blocks % p.G, i % blocks, memory.data);
    }
  });
  for_each_tile(p, parallel_for, [&](const Sequence& sequence, int64_t chunk, int64_t group) {
    kernels.scan_sum_blocks(g, sequence, chunk, group);
  });
  parallel_for(p.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) kernels.scan_sum_sequences(g, h);
  });
}

}  // namespace bitkernels::cpu
