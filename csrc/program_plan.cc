#include "program_plan.h"

#include <algorithm>
#include <cstring>

namespace jadder {
namespace {

constexpr int64_t kLargestArena = int64_t{1} << 32;
constexpr int64_t kAlignment = 64;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// -- Activations -----------------------------------------------------------------------------------

std::vector<ActivationLayout> PlanLayouts(const ProgramSpec& spec, const ProgramKernels& kernels) {
  std::vector<ActivationLayout> layouts;
  for (const ProgramValue& value : spec.values) {
    ActivationLayout layout;
    layout.height = value.height;
    layout.width = value.width;
    layout.channels = value.channels;
    layout.pitch = RoundUp(value.channels, kernels.pitch);
    layouts.push_back(std::move(layout));
  }
  for (const ProgramOperation& operation : spec.operations) {
    if (!operation.is_product() && operation.kind != ProgramKind::kSumPool) continue;
    for (int d = 0; d < 2; ++d) {
      for (int side = 0; side < 2; ++side) {
        int64_t& border = layouts[operation.input].border[d][side];
        border = std::max(border, operation.padding[d][side]);
      }
    }
  }
  return layouts;
}

void SetBytes(const ProgramValue& value, ActivationLayout& layout) {
  const int64_t rows = layout.border[0][0] + layout.height + layout.border[0][1];
  const int64_t columns = layout.border[1][0] + layout.width + layout.border[1][1];
  layout.row_bytes = CheckedProduct(columns, layout.pitch);
  layout.bytes = CheckedProduct(rows, layout.row_bytes);
  if (layout.bytes > kLargestArena) throw ProgramError("integer program: an activation is too large");
  if (rows == layout.height && columns == layout.width) return;
  layout.border_row.assign(layout.row_bytes, 0);
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t c = 0; c < layout.channels; ++c) {
      layout.border_row[column * layout.pitch + c] = value.zero[value.zero.size() == 1 ? 0 : c];
    }
  }
}

// The last step that reads each value.
std::vector<int64_t> LastUses(const ProgramSpec& spec) {
  std::vector<int64_t> last(spec.values.size());
  for (size_t i = 0; i < last.size(); ++i) last[i] = i;
  for (size_t i = 0; i < spec.operations.size(); ++i) {
    const ProgramOperation& operation = spec.operations[i];
    last[operation.input] = i + 1;
    for (const auto& residual : operation.requantization.residuals) last[residual.value] = i + 1;
  }
  return last;
}

// Each value at the lowest place that no value needed at the same time has.
int64_t PlaceValues(const ProgramSpec& spec, std::vector<ActivationLayout>& layouts) {
  const std::vector<int64_t> last = LastUses(spec);
  std::vector<int64_t> live;  // by offset
  int64_t arena = 0;
  for (size_t i = 0; i < layouts.size(); ++i) {
    ActivationLayout& layout = layouts[i];
    if (spec.values[i].wide) continue;
    SetBytes(spec.values[i], layout);
    live.erase(std::remove_if(live.begin(), live.end(),
                              [&](int64_t j) { return last[j] < static_cast<int64_t>(i); }),
               live.end());
    int64_t offset = 0;
    auto at = live.begin();
    for (; at != live.end() && layouts[*at].offset - offset < layout.bytes; ++at) {
      offset = RoundUp(layouts[*at].offset + layouts[*at].bytes, kAlignment);
    }
    live.insert(at, i);
    layout.offset = offset;
    layout.origin = offset + layout.border[0][0] * layout.row_bytes +
                    layout.border[1][0] * layout.pitch;
    arena = std::max(arena, offset + layout.bytes);
    if (arena > kLargestArena) throw ProgramError("integer program: its activations are too large");
  }
  return arena;
}

// -- Products --------------------------------------------------------------------------------------

void PlanRuns(const ProgramOperation& operation, const ActivationLayout& source, Step& step) {
  const int64_t channels = source.channels / operation.groups, group = step.product->group;
  const bool whole = operation.groups == 1;
  // A sum of maxima needs that of x too, which is there for whole pixels only.
  step.gathers = !whole && (channels % group != 0 || step.product->takes_maximum);
  step.group_terms = whole ? source.pitch : RoundUp(channels, group);
  if (step.gathers) {
    const int64_t terms = operation.taps() * step.group_terms;
    step.gathered_bytes = RoundUp(terms, 8);
    step.runs.push_back({0, terms});
    return;
  }
  const bool joined = whole && operation.dilation[1] == 1;
  const int64_t columns = joined ? 1 : operation.window[1];
  const int64_t length = step.group_terms * (joined ? operation.window[1] : 1);
  for (int64_t i = 0; i < operation.window[0]; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      step.runs.push_back({i * operation.dilation[0] * source.row_bytes +
                               j * operation.dilation[1] * source.pitch,
                           length});
    }
  }
}

// Panels of all columns of each group, one after another.
void PackWeights(const ProgramOperation& operation, int64_t all_features, Step& step) {
  const ProgramProduct& product = *step.product;
  const int64_t taps = operation.taps();
  const int64_t channels = static_cast<int64_t>(operation.kernel.size()) / taps / all_features;
  const int64_t groups_of_terms = taps * (step.group_terms / product.group);
  const int64_t column_bytes =
      CheckedProduct(groups_of_terms, int64_t{product.group} * product.weight_bytes);
  const int64_t vectors = CeilDiv(step.features, product.columns);
  step.panels = CeilDiv(vectors, product.vectors);
  step.panel_bytes = CheckedProduct(column_bytes, step.panel_columns());
  step.weights.Resize(CheckedProduct(CheckedProduct(step.panels, step.panel_bytes), operation.groups));
  for (int64_t g = 0; g < operation.groups; ++g) {
    for (int64_t p = 0; p < step.panels; ++p) {
      uint8_t* panel = step.weights.data() + (g * step.panels + p) * step.panel_bytes;
      const int64_t width = step.panel_vectors(p) * product.columns;
      const int64_t first = p * step.panel_columns();
      int64_t group = 0;
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < step.group_terms; c += product.group, ++group) {
          const uint8_t* kernel =
              operation.kernel.data() + (tap * channels + c) * all_features + g * step.features;
          const int64_t real = std::min<int64_t>(product.group, channels - c);
          for (int64_t column = 0; column < width; ++column) {
            uint8_t weights[8] = {};
            if (first + column < step.features) {
              for (int64_t i = 0; i < real; ++i) {
                weights[i] = kernel[i * all_features + first + column];
              }
            }
            product.pack(weights, width, group, column, panel);
          }
        }
      }
    }
  }
}

void PlanProduct(const ProgramOperation& operation, const ActivationLayout& source,
                 int64_t all_features, const ProgramKernels& kernels, Step& step) {
  const bool adder = operation.kind == ProgramKind::kAdder;
  step.product = adder ? &kernels.adder : &kernels.multiply;
  step.features = all_features / operation.groups;
  step.terms = CheckedProduct(operation.kernel.size(), 1);
  step.depthwise = operation.groups == source.channels && step.features == 1 && operation.groups > 1;
  if (step.depthwise) return;
  PlanRuns(operation, source, step);
  PackWeights(operation, all_features, step);
  step.starts.assign(all_features + kColumnSlack, 0);
  if (!step.product->takes_maximum) return;
  for (size_t i = 0; i < operation.kernel.size();) {
    for (int64_t f = 0; f < all_features; ++f, ++i) step.starts[f] -= operation.kernel[i];
  }
}

// -- Requantization --------------------------------------------------------------------------------

// Whether every value before the shift fits int32, whatever its parts do.
bool IsNarrow(const ProgramSpec& spec, const ProgramOperation& operation) {
  const ProgramRequantization& each = operation.requantization;
  __int128 residual_least = 0, residual_most = 0;
  for (const ProgramResidual& residual : each.residuals) {
    const __int128 most = __int128{spec.values[residual.value].maximum} * residual.multiplier *
                          (int64_t{1} << residual.left_shift);
    (most < 0 ? residual_least : residual_most) += most;
  }
  const __int128 low = *std::min_element(operation.least.begin(), operation.least.end());
  const __int128 high = *std::max_element(operation.most.begin(), operation.most.end());
  const __int128 centred = __int128(each.multiplier.size() - 1) * (high - low);
  for (size_t c = 0; c < each.multiplier.size(); ++c) {
    const __int128 least = operation.center ? -centred : __int128{operation.least[c]};
    const __int128 most = operation.center ? centred : __int128{operation.most[c]};
    const __int128 a = least * each.multiplier[c], b = most * each.multiplier[c];
    if (std::min(a, b) + each.bias[c] + residual_least < INT32_MIN) return false;
    if (std::max(a, b) + each.bias[c] + residual_most > INT32_MAX) return false;
  }
  return true;
}

void PlanRequantization(const ProgramSpec& spec, const ProgramOperation& operation, Step& step) {
  const ProgramRequantization& each = operation.requantization;
  step.narrow = IsNarrow(spec, operation);
  step.multiplier = each.multiplier;
  step.bias = each.bias;
  for (const int64_t b : each.bias) {
    step.narrow_bias.push_back(static_cast<int32_t>(static_cast<uint64_t>(b)));
  }
  const size_t size = each.multiplier.size() + kColumnSlack;
  step.multiplier.resize(size);
  step.bias.resize(size);
  step.narrow_bias.resize(size);
  for (const ProgramResidual& residual : each.residuals) {
    const uint64_t whole = static_cast<uint64_t>(residual.multiplier) << residual.left_shift;
    step.residuals.push_back({static_cast<int32_t>(residual.multiplier),
                              static_cast<int>(residual.left_shift), static_cast<int32_t>(whole)});
  }
}

}  // namespace

ProgramPlan MakePlan(const ProgramSpec& spec, const ProgramKernels& kernels) {
  ProgramPlan plan;
  plan.layouts = PlanLayouts(spec, kernels);
  plan.arena_bytes = PlaceValues(spec, plan.layouts);
  plan.steps.emplace_back();
  plan.steps.back().positions = spec.values[0].positions();
  plan.steps.back().terms = spec.values[0].channels;
  ScratchSizes& scratch = plan.scratch;
  for (size_t i = 0; i < spec.operations.size(); ++i) {
    const ProgramOperation& operation = spec.operations[i];
    const ActivationLayout& source = plan.layouts[operation.input];
    const int64_t channels = spec.values[i + 1].channels;
    Step& step = plan.steps.emplace_back();
    step.operation = &operation;
    step.input = operation.input;
    step.output = i + 1;
    step.positions = spec.values[i + 1].positions();
    step.terms = CheckedProduct(channels, operation.taps());
    if (operation.is_product()) PlanProduct(operation, source, channels, kernels, step);
    if (operation.has_sums()) PlanRequantization(spec, operation, step);
    const bool panels = step.product != nullptr && !step.depthwise;
    const int64_t columns = panels && !operation.center ? step.panel_columns() : channels;
    scratch.sums = std::max(scratch.sums, kChunkTiles * kMostTileRows * (columns + kColumnSlack));
    scratch.residuals = std::max<int64_t>(scratch.residuals, step.residuals.size());
    if (panels && step.product->takes_maximum) {
      step.window_height = (operation.window[0] - 1) * operation.dilation[0] + 1;
      step.row_sums = source.row_bytes / 4 + kColumnSlack;
      step.ring_rows = 1;
      while (step.ring_rows < step.window_height + 1) step.ring_rows *= 2;
      scratch.row_sums = std::max(scratch.row_sums, CheckedProduct(step.ring_rows, step.row_sums));
      scratch.window_rows = std::max(scratch.window_rows, operation.window[0]);
    }
    scratch.gathered = std::max(scratch.gathered, kMostTileRows * step.gathered_bytes);
  }
  return plan;
}

}  // namespace jadder
