#include "few_channels.h"

#include <algorithm>
#include <type_traits>

#include "memory.h"
#include "tasks.h"
#include "types.h"

namespace jadder {
namespace {

constexpr int64_t kTasksPerThread = 4;         // so that a slow thread delays little
constexpr int64_t kCopiedFloats = 128 * 1024;  // most floats of a task's copy of g, or nearly
constexpr int64_t kCacheLine = 16;             // floats
// Costs beside the terms, in terms of one vector, as measured: of turning a value of g, of moving
// one of x and dx, and of a target pixel where lanes are channels.
constexpr double kTurning = 0.9, kMoving = 4, kStarting = 20;

// The phases of one dimension. Their targets of one number meet `spread` + 1 sources, from
// first + number on.
struct Side {
  const std::vector<Phase>& phases;
  int64_t targets = 0;  // of the phase that has most
  int64_t first = 0, spread = -1;

  explicit Side(const std::vector<Phase>& phases) : phases(phases) {
    for (const Phase& phase : phases) {
      targets = std::max(targets, phase.count);
      if (phase.taps.empty()) continue;
      const int64_t least = phase.first_source(), most = least + phase.spread();
      const int64_t last = spread < 0 ? most : std::max(first + spread, most);
      first = spread < 0 ? least : std::min(first, least);
      spread = last - first;
    }
  }
};

// Where the vectors of a block of targets begin. They go on from row to row, over the columns that
// only the window's border reads, or begin anew where those would take more vectors.
struct Vectors {
  int64_t row_stride;  // of targets
  int64_t count;

  Vectors(int64_t rows, int64_t columns, int64_t line, int64_t lanes) {
    const int64_t of_row = CeilDiv(columns, lanes);
    const int64_t all = CeilDiv((rows - 1) * line + columns, lanes);
    row_stride = rows * of_row <= all ? of_row * lanes : line;
    count = std::min(rows * of_row, all);
  }
};

// One product, and how it is cut into tasks.
template <typename T>
class FewChannels {
 public:
  FewChannels(const Kernels& kernels, Pool& pool, const ConvShape& s, const Form& form,
              const std::vector<Phase> (&phases)[2])
      : kernels_(kernels),
        pool_(pool),
        s_(s),
        form_(form),
        down_(phases[0]),
        across_(phases[1]),
        channels_(s.channels / s.groups),
        terms_(s.filters / s.groups),
        planes_(terms_ + (form.product == Product::kPairClip)) {}

  // Whether this is possible, and quicker than with a lane for each channel.
  bool IsBetter() {
    if (channels_ > kMaxPixelChannels || terms_ == 0 || s_.out[0] == 0 || s_.out[1] == 0) {
      return false;
    }
    if (down_.phases[0].step != 1 || across_.phases[0].step != 1) return false;
    if (down_.spread < 0 || across_.spread < 0) return false;
    if (!CutUp()) return false;

    double vectors = 0, sums = 0;  // of the taps of all vectors, and of all pixels
    for (const Phase& y : down_.phases) {
      for (const Phase& x : across_.phases) {
        const double taps = double(y.taps.size()) * double(x.taps.size());
        const Vectors block(std::min(rows_, y.count), std::min(columns_, x.count), line_,
                            kernels_.lanes);
        vectors += taps * double(block.count) * double(CeilDiv(y.count, rows_)) *
                   double(CeilDiv(x.count, columns_));
        sums += taps * double(y.count) * double(x.count);
      }
    }
    const double pixels = double(s_.in[0]) * double(s_.in[1]), groups = s_.groups;
    const double turned = double(line_) * double(rows_ + down_.spread) * double(row_tasks_) *
                          double(column_tasks_) * double(planes_);
    const double ours = vectors * double(terms_ * channels_) + kTurning * turned +
                        kMoving * pixels * double(channels_);
    const double theirs = sums * double(terms_) + kStarting * pixels;  // of one vector of channels
    const bool lanewise = s_.groups > 1 && channels_ < kernels_.lanes;
    if (lanewise) return ours * groups < theirs * double(CeilDiv(s_.channels, kernels_.lanes));
    return ours < theirs * double(CeilDiv(channels_, kernels_.lanes));
  }

  // Returns false where w is not finite.
  bool Run(const T* x, const T* w, const T* g, float* dx) {
    if (!Pack(w)) return false;
    ListTaps();
    const int64_t tasks = s_.batch * s_.groups * row_tasks_ * column_tasks_;
    ParallelFor(pool_, tasks, [&](int64_t task) { RunTask(task, x, g, dx); });
    return true;
  }

 private:
  // Chooses the blocks. Returns false where a copy for the smallest would not fit a cache.
  bool CutUp() {
    if (down_.spread >= kCopiedFloats || across_.spread >= kCopiedFloats) return false;
    rows_ = down_.targets;
    columns_ = across_.targets;
    const auto fit = [&](int64_t rows) {  // so many rows of a block, with what else is copied
      const double plane = double(columns_ + across_.spread) * double(rows + down_.spread);
      return double(planes_) * (plane + 3 * kCacheLine) <= kCopiedFloats;
    };
    while (columns_ > 4 * kernels_.lanes && !fit(down_.spread + 1)) Halve();
    while (columns_ > kernels_.lanes && !fit(1)) Halve();
    if (!fit(1)) return false;
    while (rows_ > 1 && !fit(rows_)) rows_ = CeilDiv(rows_, 2);
    column_tasks_ = CeilDiv(across_.targets, columns_);
    if (pool_.threads() > 1) {
      const int64_t wanted =
          CeilDiv(pool_.threads() * kTasksPerThread, s_.batch * s_.groups * column_tasks_);
      const int64_t most = std::max(CeilDiv(down_.targets, wanted), down_.spread + 1);
      rows_ = std::min(rows_, most);
    }
    row_tasks_ = CeilDiv(down_.targets, rows_);
    rows_ = CeilDiv(down_.targets, row_tasks_);
    line_ = columns_ + across_.spread;
    // An odd number of cache lines, so that planes do not compete for the same places of a cache.
    const int64_t size = line_ * (rows_ + down_.spread) + 2 * kernels_.lanes;
    plane_ = (CeilDiv(size, kCacheLine) | 1) * kCacheLine;
    return true;
  }

  void Halve() { columns_ = CeilDiv(columns_, 2 * kernels_.lanes) * kernels_.lanes; }

  // w by groups, taps, terms and channels.
  bool Pack(const T* w) {
    const int64_t taps = s_.window[0] * s_.window[1];
    w_.Resize(CheckedProduct(CheckedProduct(taps, channels_), s_.filters));
    float* to = w_.data();
    float nan = 0;
    for (int64_t group = 0; group < s_.groups; ++group) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const T* from = w + tap * channels_ * s_.filters + group * terms_;
        for (int64_t k = 0; k < terms_; ++k) {
          for (int64_t c = 0; c < channels_; ++c, ++to) {
            *to = ToFloat(from[c * s_.filters + k]);
            nan += *to * 0;
          }
        }
      }
    }
    return form_.product == Product::kPairClip || nan == 0;  // a pair's bits may look like NaN
  }

  void ListTaps() {
    for (const Phase& y : down_.phases) {
      for (const Phase& x : across_.phases) {
        taps_.emplace_back();
        for (const Tap& r : y.taps) {
          for (const Tap& c : x.taps) {
            taps_.back().push_back({(r.start - down_.first) * line_ + c.start - across_.first,
                                    (r.tap * s_.window[1] + c.tap) * terms_ * channels_});
          }
        }
      }
    }
    down_meets_ = Meets(down_, s_.out[0]);
    across_meets_ = Meets(across_, s_.out[1]);
  }

  // For each target, whether some window covers it.
  static std::vector<char> Meets(const Side& side, int64_t sources) {
    std::vector<char> meets(side.phases.size() * side.targets);
    for (size_t i = 0; i < side.phases.size(); ++i) {
      for (int64_t j = 0; j < side.phases[i].count; ++j) {
        meets[i * side.targets + j] = side.phases[i].Meets(j, sources);
      }
    }
    return meets;
  }

  void RunTask(int64_t task, const T* x, const T* g, float* dx) const {
    const int64_t column = task % column_tasks_ * columns_;
    task /= column_tasks_;
    const int64_t row = task % row_tasks_ * rows_;
    task /= row_tasks_;
    const int64_t group = task % s_.groups, image = task / s_.groups;
    const int64_t rows = std::min(rows_, down_.targets - row);
    float* planes = ThreadBuffer<FewChannels>(CheckedProduct(planes_, plane_));
    Turn(g + image * s_.out[0] * s_.out[1] * s_.filters + group * terms_, row, rows, column,
         planes);
    const int64_t pixels = s_.in[0] * s_.in[1] * s_.channels;
    const int64_t first = image * pixels + group * channels_;
    for (size_t i = 0; i < taps_.size(); ++i) {
      RunPhase(i, group, row, column, planes, x + first, dx + first);
    }
  }

  // Writes the sources of a block as planes, with zeros where no tap meets one.
  void Turn(const T* g, int64_t row, int64_t rows, int64_t column, float* planes) const {
    const int64_t sources = rows + down_.spread, start = across_.first + column;
    const int64_t before = std::clamp<int64_t>(-start, 0, line_);
    const int64_t end = std::clamp<int64_t>(s_.out[1] - start, before, line_);
    for (int64_t r = 0; r < sources; ++r) {
      const int64_t source = down_.first + row + r;
      const bool inside = source >= 0 && source < s_.out[0];
      const int64_t from = inside ? before : line_, to = inside ? end : line_;
      float* line = planes + r * line_;
      for (int64_t k = 0; k < terms_; ++k) {
        std::fill(line + k * plane_, line + k * plane_ + from, 0.0f);
        std::fill(line + k * plane_ + to, line + k * plane_ + line_, 0.0f);
      }
      if (from == to) continue;
      const T* pixels = g + (source * s_.out[1] + start + from) * s_.filters;
      if constexpr (std::is_same_v<T, float>) {
        kernels_.transpose(pixels, s_.filters, to - from, terms_, line + from, plane_);
      } else {
        float* copy = ThreadBuffer<Side>(CheckedProduct(to - from, terms_));
        for (int64_t p = 0; p < to - from; ++p) {
          for (int64_t k = 0; k < terms_; ++k) {
            copy[p * terms_ + k] = ToFloat(pixels[p * s_.filters + k]);
          }
        }
        kernels_.transpose(copy, terms_, to - from, terms_, line + from, plane_);
      }
    }
    const int64_t used = sources * line_, behind = 2 * kernels_.lanes;  // the last vector's lanes
    for (int64_t k = 0; k < terms_; ++k) std::fill_n(planes + k * plane_ + used, behind, 0.0f);
    if (planes_ > terms_) {
      const int64_t width = CeilDiv(used + kernels_.lanes, kernels_.lanes) * kernels_.lanes;
      kernels_.plane_sums(planes, plane_, terms_, width, planes + terms_ * plane_);
    }
  }

  void RunPhase(size_t number, int64_t group, int64_t row, int64_t column, const float* planes,
                const T* x, float* dx) const {
    const size_t i = number / across_.phases.size(), j = number % across_.phases.size();
    const Phase &down = down_.phases[i], &across = across_.phases[j];
    const int64_t rows = std::min(rows_, down.count - row);
    const int64_t columns = std::min(columns_, across.count - column);
    if (rows <= 0 || columns <= 0) return;
    const Vectors vectors(rows, columns, line_, kernels_.lanes);
    const int64_t size = vectors.count * kernels_.lanes;
    float* targets = ThreadBuffer<Vectors>(CheckedProduct(2 * channels_, size));
    float* sums = targets + channels_ * size;

    const int64_t down_stride = down.period * s_.in[1] * s_.channels;
    const int64_t stride = across.period * s_.channels;
    const int64_t first = (down.residue + row * down.period) * s_.in[1] * s_.channels +
                          (across.residue + column * across.period) * s_.channels;
    std::fill_n(targets, channels_ * size, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = x + first + r * down_stride;
      float* to = targets + r * vectors.row_stride;
      for (int64_t p = 0; p < columns; ++p) {
        for (int64_t c = 0; c < channels_; ++c) to[c * size + p] = ToFloat(from[p * stride + c]);
      }
    }

    static thread_local std::vector<int64_t> starts;
    starts.clear();
    const int64_t of_row = vectors.row_stride / kernels_.lanes;
    for (int64_t v = 0; v < vectors.count; ++v) {
      const bool anew = vectors.row_stride != line_;
      starts.push_back(anew ? v / of_row * line_ + v % of_row * kernels_.lanes
                            : v * kernels_.lanes);
    }
    PixelBlock block = {};
    block.taps = taps_[number].data();
    block.num_taps = taps_[number].size();
    block.terms = terms_;
    block.w = w_.data() + group * s_.window[0] * s_.window[1] * terms_ * channels_;
    block.g = planes;
    block.g_stride = plane_;
    block.starts = starts.data();
    block.vectors = vectors.count;
    block.x = targets;
    block.out = sums;
    block.channel_stride = size;
    block.factor = form_.factor;
    block.bound = form_.limit;
    block.step = form_.grid.step;
    block.row_step = form_.row_step;
    block.bound_steps = form_.grid.bound_steps;
    kernels_.pixels(form_.product, channels_, block);

    for (int64_t r = 0; r < rows; ++r) {
      float* to = dx + first + r * down_stride;
      const float* from = sums + r * vectors.row_stride;
      const bool row_meets = down_meets_[i * down_.targets + row + r];
      const char* meets = across_meets_.data() + j * across_.targets + column;
      for (int64_t p = 0; p < columns; ++p) {
        const bool covered = row_meets && meets[p];  // otherwise x may be NaN
        for (int64_t c = 0; c < channels_; ++c) {
          to[p * stride + c] = covered ? from[c * size + p] : 0;
        }
      }
    }
  }

  const Kernels& kernels_;
  Pool& pool_;
  const ConvShape& s_;
  const Form& form_;
  const Side down_, across_;
  const int64_t channels_, terms_;  // of a group
  const int64_t planes_;            // of g, and of pairs their sum
  int64_t rows_ = 1, columns_ = 1;  // of a block, in targets of a phase
  int64_t row_tasks_ = 1, column_tasks_ = 1;
  int64_t line_ = 0, plane_ = 0;  // floats of a copied row of one plane, and of the plane
  Buffer<float> w_;
  std::vector<std::vector<PixelTap>> taps_;  // of each pair of phases
  std::vector<char> down_meets_, across_meets_;
};

}  // namespace

template <typename T>
bool ConvDxOfFewChannels(const Kernels& kernels, Pool& pool, const ConvShape& s, const Form& form,
                         const std::vector<Phase> (&phases)[2], const T* x, const T* w, const T* g,
                         float* dx) {
  FewChannels<T> product(kernels, pool, s, form, phases);
  return product.IsBetter() && product.Run(x, w, g, dx);
}

template bool ConvDxOfFewChannels(const Kernels&, Pool&, const ConvShape&, const Form&,
                                  const std::vector<Phase> (&)[2], const float*, const float*,
                                  const float*, float*);
template bool ConvDxOfFewChannels(const Kernels&, Pool&, const ConvShape&, const Form&,
                                  const std::vector<Phase> (&)[2], const bfloat16*,
                                  const bfloat16*, const bfloat16*, float*);

}  // namespace jadder
