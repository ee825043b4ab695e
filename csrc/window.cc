#include "window.h"

#include <algorithm>
#include <numeric>

namespace jadder {

int64_t Phase::grain() const {
  int64_t grain = count > 1 ? step : 0;
  for (const Tap& tap : taps) grain = std::gcd(grain, tap.start - first_source());
  return std::max<int64_t>(1, grain);
}

bool Phase::Inside(int64_t sources) const {
  return first_source() >= 0 && first_source() + spread() + (count - 1) * step < sources;
}

std::vector<Phase> SplitPhases(int64_t targets, int64_t multiply, int64_t divide,
                               const std::vector<int64_t>& offsets) {
  const int64_t common = std::gcd(multiply, divide);
  std::vector<Phase> phases;
  for (int64_t residue = 0; residue < std::min(divide / common, targets); ++residue) {
    Phase phase;
    phase.residue = residue;
    phase.period = divide / common;
    phase.step = multiply / common;
    phase.count = (targets - residue + phase.period - 1) / phase.period;
    for (size_t tap = 0; tap < offsets.size(); ++tap) {
      const int64_t numerator = residue * multiply + offsets[tap];
      if (numerator % divide == 0) {
        phase.taps.push_back({static_cast<int64_t>(tap), numerator / divide});
      }
    }
    std::sort(phase.taps.begin(), phase.taps.end(),
              [](const Tap& a, const Tap& b) { return a.start < b.start; });
    phases.push_back(std::move(phase));
  }
  return phases;
}

}  // namespace jadder
