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
  bool Inside(int64_t sources) const;  // whether no target reaches beyond the sources
  // Whether some tap meets a source at target j, and whether one does at each target.
  bool Meets(int64_t j, int64_t sources) const;
  bool AllMeet(int64_t sources) const;
};

// The sources that neighbouring targets of a phase meet: every grain-th one of some stretches.
// Taps whose sources lie apart have stretches of their own, and so have all where targets lie far
// apart, so that what a wide dilation or stride leaves out is not counted.
struct Stretches {
  struct Stretch {
    int64_t first;   // source of the first target
    int64_t spread;  // from the first of its taps to the last
    int64_t place;   // of its first source, where the stretches follow one another
  };

  int64_t step = 1, grain = 1;
  std::vector<Stretch> stretches;
  std::vector<int64_t> places;  // of each tap's source for the first target
  int64_t size = 0;             // sources of all stretches

  Stretches() = default;
  Stretches(const Phase& phase, int64_t targets);
  // All from the first source to the last, where they lie.
  static Stretches InPlace(const Phase& phase);

  // How many sources of a stretch so many targets meet.
  int64_t Count(const Stretch& stretch, int64_t targets) const {
    return ((targets - 1) * step + stretch.spread) / grain + 1;
  }
};

// Sums over the channels of each tap of a two-dimensional window, and sums of those.
template <typename Sum>
class TapSums {
 public:
  TapSums() = default;
  TapSums(int64_t rows, int64_t columns, int64_t lanes)
      : rows_(rows), columns_(columns), lanes_(lanes), taps_(rows * columns * lanes) {}

  bool empty() const { return taps_.empty(); }
  Sum* At(int64_t tap) { return taps_.data() + tap * lanes_; }

  // To be called when all taps have their sums.
  void AddUp() {
    whole_rows_.resize(rows_ * lanes_);
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < columns_; ++c) Add(taps_, r * columns_ + c, &whole_rows_[r * lanes_]);
    }
  }

  // The sum, for each lane, of the taps that are not in both of these phases.
  std::vector<Sum> Without(const Phase& rows, const Phase& columns) const {
    std::vector<char> row_is_in(rows_, 0), column_is_in(columns_, 0);
    for (const Tap& tap : rows.taps) row_is_in[tap.tap] = 1;
    for (const Tap& tap : columns.taps) column_is_in[tap.tap] = 1;
    std::vector<Sum> sums(lanes_);
    for (int64_t r = 0; r < rows_; ++r) {
      if (!row_is_in[r]) {
        Add(whole_rows_, r, sums.data());
        continue;
      }
      for (int64_t c = 0; c < columns_; ++c) {
        if (!column_is_in[c]) Add(taps_, r * columns_ + c, sums.data());
      }
    }
    return sums;
  }

 private:
  void Add(const std::vector<Sum>& from, int64_t i, Sum* to) const {
    for (int64_t lane = 0; lane < lanes_; ++lane) to[lane] += from[i * lanes_ + lane];
  }

  int64_t rows_ = 0, columns_ = 0, lanes_ = 0;
  std::vector<Sum> taps_, whole_rows_;
};

// Splits targets i, that meet source (i · multiply + offsets[tap]) / divide where that is whole.
//
// A forward convolution reads input (o · stride + tap · rhs_dilation - low) / lhs_dilation for
// output o; its transpose reads output (i · lhs_dilation - tap · rhs_dilation + low) / stride for
// input i. Within a phase no product with an inserted zero is computed.
std::vector<Phase> SplitPhases(int64_t targets, int64_t multiply, int64_t divide,
                               const std::vector<int64_t>& offsets);

}  // namespace jadder
