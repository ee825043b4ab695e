// Random integer programs against their definition, on several threads; then the same programs
// with damaged bytes, which must be refused or be other programs.
//
//   programs [seed] [cases] [threads]
//
// Meant to be built with -fsanitize=address,undefined, or with thread.

#include "program.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "driver.h"

namespace {

using namespace jadder;

using Values = std::vector<int64_t>;

// -- The definition --------------------------------------------------------------------------------

int64_t At(const ProgramValue& value, int64_t y, int64_t x, int64_t c) {
  return (y * value.width + x) * value.channels + c;
}

Values Literal(const ProgramSpec& spec, const ProgramOperation& op, const ProgramValue& out,
               const std::vector<Values>& values) {
  const ProgramValue& in = spec.values[op.input];
  const Values& x = values[op.input];
  if (op.kind == ProgramKind::kReshape) return x;
  const int64_t c_group = in.channels / op.groups, f_group = out.channels / op.groups;
  Values result(out.size());
  for (int64_t i = 0; i < out.height; ++i)
    for (int64_t j = 0; j < out.width; ++j) {
      Values sums(out.channels, 0);
      for (int64_t p = 0; p < op.window[0]; ++p)
        for (int64_t q = 0; q < op.window[1]; ++q) {
          const int64_t y = i * op.strides[0] + p * op.dilation[0] - op.padding[0][0];
          const int64_t z = j * op.strides[1] + q * op.dilation[1] - op.padding[1][0];
          const bool inside = y >= 0 && y < in.height && z >= 0 && z < in.width;
          const auto input = [&](int64_t c) -> int64_t {
            return inside ? x[At(in, y, z, c)] : in.zero[in.zero.size() == 1 ? 0 : c];
          };
          for (int64_t f = 0; f < out.channels; ++f) {
            if (op.kind == ProgramKind::kMaxPool) {
              if (inside) sums[f] = std::max(sums[f], input(f));
            } else if (!op.is_product()) {
              sums[f] += input(f);
            } else {
              for (int64_t c = 0; c < c_group; ++c) {
                const uint8_t w =
                    op.kernel[((p * op.window[1] + q) * c_group + c) * out.channels + f];
                const int64_t q_in = input(f / f_group * c_group + c);
                sums[f] += op.kind == ProgramKind::kAdder ? std::abs(q_in - w)
                                                          : q_in * static_cast<int8_t>(w);
              }
            }
          }
        }
      int64_t total = 0;
      for (const int64_t s : sums) total += s;
      for (int64_t f = 0; f < out.channels; ++f) {
        const int64_t at = At(out, i, j, f);
        result[at] = sums[f];
        if (op.kind == ProgramKind::kMaxPool) continue;
        const ProgramRequantization& each = op.requantization;
        int64_t value = op.center ? out.channels * sums[f] - total : sums[f];
        value = value * each.multiplier[f] + each.bias[f];
        for (const ProgramResidual& r : each.residuals) {
          value += values[r.value][at] * (r.multiplier * (int64_t{1} << r.left_shift));
        }
        result[at] = std::min(std::max(value >> each.shift, each.low), each.high);
      }
    }
  return result;
}

// -- The bytes -------------------------------------------------------------------------------------

struct Writer {
  std::vector<uint8_t> bytes;
  void Bits(uint64_t value, int size) {
    for (int i = 0; i < size; ++i) bytes.push_back(static_cast<uint8_t>(value >> (8 * i)));
  }
  void Number(int64_t value) { Bits(static_cast<uint64_t>(value), 8); }
  void Value(const ProgramValue& value) {
    for (const int64_t n : {value.height, value.width, value.channels, int64_t{value.wide},
                            value.maximum, static_cast<int64_t>(value.zero.size())}) {
      Number(n);
    }
    bytes.insert(bytes.end(), value.zero.begin(), value.zero.end());
  }
  void Operation(const ProgramOperation& op, const ProgramValue& output) {
    Number(static_cast<int64_t>(op.kind));
    Number(op.input);
    Value(output);
    if (op.is_product() || op.kind == ProgramKind::kSumPool || op.kind == ProgramKind::kMaxPool) {
      for (const auto* pair : {op.window, op.strides, op.dilation}) {
        for (int d = 0; d < 2; ++d) Number(pair[d]);
      }
      for (const auto& pair : op.padding) {
        for (const int64_t side : pair) Number(side);
      }
    }
    if (op.is_product()) {
      Number(op.groups);
      Number(op.center);
      bytes.insert(bytes.end(), op.kernel.begin(), op.kernel.end());
    }
    if (!op.has_sums()) return;
    const ProgramRequantization& each = op.requantization;
    for (const int32_t m : each.multiplier) Bits(static_cast<uint32_t>(m), 4);
    for (const int64_t b : each.bias) Number(b);
    for (const int64_t n : {each.shift, each.low, each.high}) Number(n);
    Number(each.residuals.size());
    for (const ProgramResidual& r : each.residuals) {
      for (const int64_t n : {r.value, r.multiplier, r.left_shift}) Number(n);
    }
  }
};

uint32_t Crc32(const std::vector<uint8_t>& bytes) {
  uint32_t crc = ~0u;
  for (const uint8_t byte : bytes) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320u : 0);
  }
  return ~crc;
}

std::vector<uint8_t> Body(const ProgramSpec& spec) {
  Writer body;
  body.Value(spec.values[0]);
  body.Number(spec.operations.size());
  for (size_t i = 0; i < spec.operations.size(); ++i) {
    body.Operation(spec.operations[i], spec.values[i + 1]);
  }
  return std::move(body.bytes);
}

ProgramSpec Read(const std::vector<uint8_t>& body) {
  Writer all;
  for (const char letter : {'J', 'A', 'D', 'D', 'E', 'R', 'I', 'P'}) all.bytes.push_back(letter);
  all.Number(1);
  all.Bits(Crc32(body), 4);
  all.bytes.insert(all.bytes.end(), body.begin(), body.end());
  return ReadProgram(all.bytes.data(), all.bytes.size());
}

// -- Random programs -------------------------------------------------------------------------------

void AddRequantization(Random& random, ProgramSpec& spec, ProgramValue& out,
                       ProgramOperation& op) {
  ProgramRequantization& each = op.requantization;
  const int64_t shift = random.To(1) ? random.From(0, 30) : random.From(0, 40);
  const int64_t size = random.To(1) ? 1 << 8 : INT32_MAX;
  for (int64_t f = 0; f < out.channels; ++f) {
    each.multiplier.push_back(static_cast<int32_t>(random.From(-size, size)));
    each.bias.push_back(random.From(-(int64_t{1} << shift) * 300, (int64_t{1} << shift) * 300));
  }
  each.shift = shift;
  each.low = out.wide ? INT32_MIN : random.To(1) * random.To(out.maximum);
  each.high = out.wide ? INT32_MAX : random.From(each.low, out.maximum);
  for (size_t v = 0; v < spec.values.size(); ++v) {
    const ProgramValue& value = spec.values[v];
    if (value.height != out.height || value.width != out.width ||
        value.channels != out.channels || random.To(1)) {
      continue;
    }
    each.residuals.push_back(
        {static_cast<int64_t>(v), random.From(-size, size), random.To(1) * random.To(22)});
  }
}

void AddOperation(Random& random, bool last, ProgramSpec& spec) {
  ProgramOperation op;
  op.input = random.From(std::max<int64_t>(0, spec.values.size() - 2), spec.values.size() - 1);
  const ProgramValue in = spec.values[op.input];
  op.kind = static_cast<ProgramKind>(random.To(1) ? random.To(1) : random.To(5));
  while (!op.has_sums() && (last || in.zero.size() > 1)) {
    op.kind = static_cast<ProgramKind>(random.To(4));
  }
  ProgramValue out = in;
  out.wide = last;
  if (op.kind == ProgramKind::kReshape) {
    out.width = 1;
    out.height = in.width;
    out.channels = in.height * in.channels;
  } else if (op.kind != ProgramKind::kRescale) {
    int64_t* sizes[] = {&out.height, &out.width};
    for (int d = 0; d < 2; ++d) {
      const int64_t size = *sizes[d];
      op.window[d] = random.From(1, std::min<int64_t>(size, 4));
      op.strides[d] = random.From(1, 3);
      if (op.is_product() && random.Once(3)) op.dilation[d] = random.From(1, 2);
      const int64_t span = (op.window[d] - 1) * op.dilation[d] + 1;
      const int64_t most = op.kind == ProgramKind::kMaxPool ? op.window[d] - 1 : 3;
      for (int64_t& side : op.padding[d]) side = random.To(most);
      if (size + op.padding[d][0] + op.padding[d][1] < span) op.dilation[d] = 1;
      const int64_t room = size + op.padding[d][0] + op.padding[d][1] -
                           ((op.window[d] - 1) * op.dilation[d] + 1);
      *sizes[d] = room / op.strides[d] + 1;
    }
  }
  if (op.is_product()) {
    if (random.To(1)) op.groups = in.channels;
    if (in.channels % 2 == 0 && random.To(1)) op.groups = 2;
    out.channels = op.groups * random.From(1, op.groups > 2 ? 3 : 70);
    op.center = random.Once(3);
    op.kernel.resize(op.taps() * in.channels / op.groups * out.channels);
    for (uint8_t& w : op.kernel) w = static_cast<uint8_t>(random.To(255));
  }
  if (op.has_sums()) {
    out.maximum = last || random.To(1) ? 255 : random.From(1, 255);
    out.zero = {static_cast<uint8_t>(last ? 0 : random.To(out.maximum))};
    AddRequantization(random, spec, out, op);
  }
  spec.operations.push_back(op);
  spec.values.push_back(out);
}

ProgramSpec RandomProgram(Random& random) {
  ProgramSpec spec;
  ProgramValue image;
  image.height = random.From(1, 9);
  image.width = random.From(1, 9);
  image.channels = random.From(1, 20);
  image.zero.resize(random.To(1) ? 1 : image.channels);
  for (uint8_t& z : image.zero) z = static_cast<uint8_t>(random.To(255));
  spec.values.push_back(image);
  const int64_t operations = random.From(1, 5);
  for (int64_t i = 0; i < operations; ++i) AddOperation(random, i + 1 == operations, spec);
  return spec;
}

std::vector<int32_t> Outputs(const Program& program, Pool& pool, const std::vector<uint8_t>& images,
                             int64_t batch) {
  std::vector<int32_t> outputs(batch * program.output().size(), 0x55555555);
  program.Run(pool, images.data(), batch, outputs.data());
  return outputs;
}

std::vector<uint8_t> Images(Random& random, const ProgramValue& image, int64_t batch) {
  std::vector<uint8_t> images(batch * image.size());
  for (uint8_t& q : images) q = static_cast<uint8_t>(random.To(image.maximum));
  return images;
}

// Now and then a number, which is all zeros beyond two bytes, and any byte.
void Damage(Random& random, std::vector<uint8_t>& body) {
  const int64_t size = body.size(), count = random.From(1, 2);
  for (int64_t i = 0; i < count; ++i) {
    body[random.To(1) ? random.To(size - 1) : random.To(std::min<int64_t>(size - 1, 300))] =
        static_cast<uint8_t>(random.To(1) ? random.To(255) : random.To(3));
  }
  if (random.Once(8)) body.resize(random.To(size));
}

bool IsSmall(const ProgramSpec& spec) {
  int64_t terms = 0;
  for (const ProgramValue& value : spec.values) terms += value.size();
  for (size_t i = 0; i < spec.operations.size(); ++i) {
    const ProgramOperation& op = spec.operations[i];
    if (op.window[0] > 64 || op.window[1] > 64) return false;
    for (const auto& pair : op.padding) {
      if (pair[0] > 64 || pair[1] > 64) return false;
    }
    terms += spec.values[i + 1].size() * op.taps();
  }
  return terms < 200000;
}

void Try(const ProgramKernels& kernels, Pool& pool, Random& random) {
  const ProgramSpec random_spec = RandomProgram(random);
  std::vector<uint8_t> body = Body(random_spec);
  ProgramSpec spec;
  try {
    spec = Read(body);
  } catch (const ProgramError&) {
    return;  // too large multipliers
  }
  const int64_t batch = random.To(5);
  const std::vector<uint8_t> images = Images(random, spec.values[0], batch);
  const Program program(spec, kernels);
  const std::vector<int32_t> outputs = Outputs(program, pool, images, batch);
  for (int64_t i = 0; i < batch; ++i) {
    std::vector<Values> values(1);
    const int64_t size = spec.values[0].size();
    values[0].assign(images.begin() + i * size, images.begin() + (i + 1) * size);
    for (size_t o = 0; o < spec.operations.size(); ++o) {
      values.push_back(Literal(spec, spec.operations[o], spec.values[o + 1], values));
    }
    const Values& expected = values.back();
    for (size_t j = 0; j < expected.size(); ++j) {
      const int32_t actual = outputs[i * expected.size() + j];
      if (actual != expected[j]) {
        std::printf("output[%zu] is %d, not %lld\n", j, actual, (long long)expected[j]);
        std::abort();
      }
    }
  }
  for (int attempt = 0; attempt < 4; ++attempt) {
    std::vector<uint8_t> damaged = body;
    Damage(random, damaged);
    try {
      ProgramSpec other = Read(damaged);
      if (!IsSmall(other)) continue;
      const Program accepted(std::move(other), kernels);
      Outputs(accepted, pool, Images(random, accepted.input(), 1), 1);
    } catch (const ProgramError&) {
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const ProgramKernels& kernels = SelectProgramKernels();
  return Drive(
      count, arguments, [&kernels](Pool& pool, Random& random) { Try(kernels, pool, random); },
      kernels.name);
}
