#include "window.h"

#include <algorithm>
#include <numeric>

namespace jadder {
namespace {

constexpr double kSparse = 8;  // sources of a stretch for each that is met

}  // namespace

bool Phase::Inside(int64_t sources) const {
  return first_source() >= 0 && first_source() + spread() + (count - 1) * step < sources;
}

bool Phase::Meets(int64_t j, int64_t sources) const {
  for (const Tap& tap : taps) {
    const int64_t source = tap.start + j * step;
    if (source >= 0 && source < sources) return true;
  }
  return false;
}

bool Phase::AllMeet(int64_t sources) const {
  for (int64_t j = 0; j < count; ++j) {
    if (!Meets(j, sources)) return false;
  }
  return true;
}

Stretches::Stretches(const Phase& phase, int64_t targets) : step(phase.step) {
  const int64_t length = (targets - 1) * step;  // of what one tap meets, from first to last
  int64_t common = targets > 1 ? step : 0;
  // Between targets far apart lies much that no tap meets: then each tap has a stretch of its own.
  const double met = static_cast<double>(phase.taps.size()) * static_cast<double>(targets);
  const double all = static_cast<double>(length) + static_cast<double>(phase.spread());
  const bool apart = all > kSparse * met;
  for (const Tap& tap : phase.taps) {
    if (!apart && !stretches.empty()) {
      Stretch& last = stretches.back();
      if (tap.start <= last.first + last.spread + length) {
        last.spread = tap.start - last.first;
        common = std::gcd(common, last.spread);
        continue;
      }
    }
    stretches.push_back({tap.start, 0, 0});
  }
  grain = std::max<int64_t>(1, common);
  for (Stretch& stretch : stretches) {
    stretch.place = size;
    size += Count(stretch, targets);
  }
  auto stretch = stretches.begin();
  for (const Tap& tap : phase.taps) {
    if (tap.start > stretch->first + stretch->spread) ++stretch;
    places.push_back(stretch->place + (tap.start - stretch->first) / grain);
  }
}

Stretches Stretches::InPlace(const Phase& phase) {
  Stretches all;
  all.step = phase.step;
  all.stretches.push_back({phase.first_source(), phase.spread(), 0});
  for (const Tap& tap : phase.taps) all.places.push_back(tap.start - phase.first_source());
  return all;
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
