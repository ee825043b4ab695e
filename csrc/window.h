// Which sources each target of a strided, dilated window meets, in one dimension.

#pragma once

#include <cstdint>
#include <vector>

namespace jadder {

// Target number j of a phase meets source start + j · step through tap `tap`.
struct Tap {
  int64_t tap;
  int64_t start;
};

// Targets residue + j · period, 0 <= j < count, which all meet the same taps, in order of `start`.
struct Phase {
  int64_t residue, period, count, step;
  std::vector<Tap> taps;

  int64_t first_source() const { return taps.empty() ? 0 : taps.front().start; }
  int64_t spread() const { return taps.empty() ? 0 : taps.back().start - first_source(); }
  // The largest stride that visits every source of the phase, from the first on.
  int64_t grain() const;
  bool Inside(int64_t sources) const;  // whether no target reaches beyond the sources
};

// Splits targets i, that meet source (i · multiply + offsets[tap]) / divide where that is whole.
//
// A forward convolution reads input (o · stride + tap · rhs_dilation - low) / lhs_dilation for
// output o; its transpose reads output (i · lhs_dilation - tap · rhs_dilation + low) / stride for
// input i. Within a phase no product with an inserted zero is computed.
std::vector<Phase> SplitPhases(int64_t targets, int64_t multiply, int64_t divide,
                               const std::vector<int64_t>& offsets);

}  // namespace jadder
