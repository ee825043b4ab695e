// Operands as multiples of one step, in 16 bits, for the products of pairs (see kernels.h).
//
// Between neighbouring values of x and beyond all of them |x - w| and clip(w - x) are linear in w.
// So the range of x decides on the step: what of w lies outside is cut off, and what |w - x| loses
// by that is the same for all x, the `excess` of w.

#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "tasks.h"

namespace jadder {

// The least and the largest of some values and zero.
struct Range {
  float low = 0, high = 0;
  bool finite = true;

  float largest() const { return high > -low ? high : -low; }
  Range And(const Range& other) const {
    return {low < other.low ? low : other.low, high > other.high ? high : other.high,
            finite && other.finite};
  }
};

template <typename T>
Range FindRange(const Kernels& kernels, Pool& pool, const T* values, int64_t count);

// Integers round(value / step) of the values within [low, high]. `fits` is false where there is no
// such grid: values that are not finite, or a range too small or too large for floats.
struct Grid {
  bool fits = false;
  float step = 0, low = 0, high = 0;
  int16_t start = 0;        // kPairMax
  int16_t bound_steps = 0;  // kPairClip: clip's bound, a whole number of steps

  // Of x and w, so that kChunkTerms of their maxima fit 16 bits: 2046 steps from low to high.
  static Grid ForMax(const Range& x);
  // Of all values of x and w, so that the squares of 2 · kChunkTerms pairs of differences fit 32
  // bits: 4094 steps from low to high.
  static Grid ForSquare(const Range& both);
  // Of x and w where the difference is clipped: at most 4096 steps from zero. It does not fit either
  // where the bound has fewer than 32 of them.
  static Grid ForClip(const Range& x, float bound);
  // Of g: at most 8191 steps from zero.
  static Grid ForGradient(const Range& g);
  // Of w that meets g: at most 4095 steps from zero.
  static Grid ForLinear(const Range& w);

  float inverse() const { return step == 0 ? 0 : 1 / step; }
};

// Values on a grid, in `groups` stretches of `terms` integers, each filled up to whole pairs.
class Pairs {
 public:
  // Of values that lie term by term.
  template <typename T>
  Pairs(const Kernels& kernels, Pool& pool, const Grid& grid, const T* values, int64_t groups,
        int64_t terms);

  // As the code that moves floats takes them.
  const float* data() const { return reinterpret_cast<const float*>(pairs_.data()); }

 private:
  Buffer<int16_t> pairs_;
};

// The kernel of a forward product, whose terms are not neighbours: (groups, terms, columns) becomes
// (groups, pairs, columns) of pairs.
class PairRows {
 public:
  template <typename T>
  PairRows(const Kernels& kernels, Pool& pool, const Grid& grid, const T* values, int64_t groups,
           int64_t terms, int64_t columns);

  const float* data() const { return pairs_.data(); }
  // Σ over all groups and terms of what the grid cuts off, for each column.
  const std::vector<float>& excess() const { return excess_; }

 private:
  Buffer<float> pairs_;
  std::vector<float> excess_;
};

// Whether so many terms repay finding the range of so many values and rounding them.
inline bool RepaysRounding(double terms, double values) { return terms >= 24 * values; }

inline int64_t PairCount(int64_t terms) { return (terms + 1) / 2; }

}  // namespace jadder
