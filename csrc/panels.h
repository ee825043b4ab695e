// The operand that is read in whole vectors, laid out as the register tiles read it, and the loops
// over the tiles of one block of the result.

#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "grid.h"
#include "kernels.h"
#include "memory.h"
#include "tasks.h"

namespace jadder {

inline bool IsOfPairs(Product product) {
  return product == Product::kPairMax || product == Product::kPairSquare ||
         product == Product::kPairClip || product == Product::kPairLinear;
}

// What is computed: a product, and for gradients ψ(d) = clip(scale · d, -bound, bound) written as
// factor · clip(d, ±limit), factor · sign(d) or factor · d.
struct Form {
  Product product;
  float factor = -1;
  float limit = 0;
  bool lanewise = false;
  float row_step = 0;  // kPairClip, kPairLinear: of the operand that is read value by value
  Grid grid = {};      // of pairs: of the other two

  bool is_gradient() const {
    return product == Product::kClip || product == Product::kSign || product == Product::kLinear ||
           product == Product::kPairClip || product == Product::kPairLinear;
  }
  bool sums_rows() const {
    return product == Product::kMax || (of_pairs() && product != Product::kPairSquare);
  }
  bool sums_columns() const { return product == Product::kMax || product == Product::kPairMax; }
  bool of_pairs() const { return IsOfPairs(product); }
  bool has_wide_panels(const Kernels& kernels) const {
    if (lanewise) return false;
    if (product == Product::kAbs || product == Product::kSquare) return kernels.wide_sums;
    return product == Product::kMax;
  }
  int most_rows(const Kernels& kernels) const {
    if (product == Product::kPairMax || product == Product::kPairSquare) {
      return kernels.pair_max_rows;
    }
    if (product == Product::kPairClip) return kernels.pair_clip_rows;
    return is_gradient() ? kernels.gradient_rows : kernels.forward_rows;
  }
  static Form Gradient(double scale, double bound);
  // In pairs, on a grid for operands of such ranges, which may not fit: kPairMax or kPairSquare, and
  // kClip or kLinear as kPairClip or kPairLinear.
  static Form ForwardInPairs(Product product, const Range& x, const Range& w);
  Form GradientInPairs(const Range& x, const Range& w) const;
};

inline constexpr int64_t kCacheBytes = 256 * 1024;  // of a second-level cache, for one operand
inline constexpr int64_t kMostTerms = 512;          // in one pass over a tile of a product
inline constexpr int64_t kMostGradientTerms = 256;  // of a gradient, whose rows fill caches sooner
inline constexpr int64_t kSmall = 64 * 1024;        // terms or copies not worth waking a thread for

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How an operand of `depth` terms and `columns` lanes is cut up. Panel p holds `width(p)` lanes,
// zeros after the last column, and lies at `offset(p)` with its terms one after another.
struct PanelShape {
  int64_t depth = 0, columns = 0;
  int64_t lanes = 1, full_width = 1;  // of a vector, and of each panel but the last
  int64_t count = 0, last_used = 0, last_width = 0;
  int64_t most_terms = kMostTerms;

  PanelShape() = default;
  PanelShape(const Kernels& kernels, const Form& form, int64_t depth, int64_t columns)
      : depth(depth),
        columns(columns),
        lanes(kernels.lanes),
        full_width(lanes * (form.has_wide_panels(kernels) ? kernels.forward_vectors : 1)),
        count(CeilDiv(columns, full_width)),
        last_used(columns - (count - 1) * full_width),
        last_width(CeilDiv(last_used, lanes) * lanes),
        most_terms(form.is_gradient() ? kMostGradientTerms : kMostTerms) {}

  int64_t padded_columns() const { return (count - 1) * full_width + last_width; }
  int64_t size() const { return CheckedProduct(padded_columns(), depth); }
  int64_t offset(int64_t p) const { return p * full_width * depth; }
  int64_t width(int64_t p) const { return p + 1 < count ? full_width : last_width; }
  int64_t used(int64_t p) const { return p + 1 < count ? full_width : last_used; }

  // The sum is cut into passes of nearly equal length.
  int64_t passes() const { return CeilDiv(depth, most_terms); }
  int64_t pass_begin(int64_t pass) const { return depth * pass / std::max<int64_t>(1, passes()); }
};

// Where the values come from, in segments of as many terms each: term t of segment s in lane c is at
// data[segments[s] + t · term_stride + c · lane_stride], or with `lane_offsets`, whose size is a
// multiple of the lanes, at data[segments[s] + t · term_stride + lane_offsets[c]].
struct PanelSource {
  const void* data;
  bool is_bfloat16;
  const std::vector<int64_t>* segments;
  int64_t segment_terms;
  int64_t term_stride;
  int64_t lane_stride;
  const int64_t* lane_offsets = nullptr;
  const float* excess = nullptr;  // kPairMax: of each column
};

// An operand. Without `packed` each task packs what it needs at the time, which spares writing and
// reading a copy where few rows meet it.
struct Panels {
  PanelShape shape;
  PanelSource source;
  const float* packed = nullptr;
  const float* sums = nullptr;  // kMax, kPairMax: for each pass a row of padded_columns() sums
  bool finite = true;
};

// Packed copies of several operands of one shape.
class PackedPanels {
 public:
  PackedPanels() = default;
  PackedPanels(Pool& pool, const Form& form, const PanelShape& shape, int64_t count,
               const std::function<PanelSource(int64_t)>& source);

  // Points `panels` to copy i.
  void Fill(int64_t i, Panels& panels) const;

 private:
  int64_t size_ = 0, sums_size_ = 0;
  Buffer<float> packed_, sums_;
  bool finite_ = true;
};

// `runs`, whose terms have `width` floats each, cut where a pass of `shape` begins; those of pass i
// start at first[i].
struct PassRuns {
  std::vector<Run> runs;
  std::vector<int64_t> first;

  PassRuns() = default;
  PassRuns(const PanelShape& shape, const std::vector<Run>& whole, int64_t width = 1);
};

// Runs a tile of panel p, on copies where the last panel is narrower than its vectors.
void RunTile(const Kernels& kernels, const Form& form, const PanelShape& shape, int64_t p, int rows,
             const Tile& tile);

// Rows of a result and where their operands are: what one task computes.
struct Block {
  int64_t rows = 0;
  const float* const* row = nullptr;  // the operand that is read value by value
  float* out = nullptr;
  const int64_t* offset = nullptr;  // of a row's first lane in `out`
  const float* targets = nullptr;   // of gradients
  const int64_t* target_offset = nullptr;
};

// Computes panels [begin, end) of the block's rows, adding to `out` if `add`.
void MultiplyBlock(const Kernels& kernels, const Form& form, const Panels& panels,
                   const PassRuns& runs, const Block& block, int64_t begin, int64_t end, bool add);

}  // namespace jadder
