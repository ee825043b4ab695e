#include "program_format.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace jadder {
namespace {

constexpr char kMagic[] = "JADDERIP";
constexpr int64_t kVersion = 1;
constexpr int64_t kLargestSize = int64_t{1} << 30;
constexpr int64_t kMostPadding = int64_t{1} << 15;
constexpr __int128 kLargestValue = __int128{1} << 62;

[[noreturn]] void Refuse(const std::string& why) { throw ProgramError("integer program: " + why); }

void Require(bool condition, const char* why) {
  if (!condition) Refuse(why);
}

uint32_t Crc32(const uint8_t* bytes, int64_t size) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> made;
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? 0xedb88320u : 0);
      made[i] = value;
    }
    return made;
  }();
  uint32_t crc = ~0u;
  for (int64_t i = 0; i < size; ++i) crc = table[(crc ^ bytes[i]) & 0xff] ^ (crc >> 8);
  return ~crc;
}

// What is left to read. Numbers are little-endian int64.
class Reader {
 public:
  Reader(const uint8_t* bytes, int64_t size) : at_(bytes), left_(size) {}

  int64_t left() const { return left_; }

  const uint8_t* Bytes(int64_t count) {
    Require(count >= 0 && count <= left_, "its bytes end too early");
    const uint8_t* bytes = at_;
    at_ += count;
    left_ -= count;
    return bytes;
  }
  uint64_t Bits(int size) {
    const uint8_t* bytes = Bytes(size);
    uint64_t value = 0;
    for (int i = 0; i < size; ++i) value |= uint64_t{bytes[i]} << (8 * i);
    return value;
  }
  int64_t Number() { return static_cast<int64_t>(Bits(8)); }
  int64_t Number(int64_t least, int64_t most, const char* what) {
    const int64_t value = Number();
    if (value < least || value > most) {
      Refuse(std::string(what) + " is " + std::to_string(value) + ", not from " +
             std::to_string(least) + " to " + std::to_string(most));
    }
    return value;
  }

 private:
  const uint8_t* at_;
  int64_t left_;
};

// A product of sizes, each at least 1.
int64_t Product(std::initializer_list<int64_t> sizes, const char* what) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product) || product > kLargestSize) {
      Refuse(std::string(what) + " is too large");
    }
  }
  return product;
}

ProgramValue ReadValue(Reader& in, bool image, bool last) {
  ProgramValue value;
  value.height = in.Number(1, kLargestSize, "a height");
  value.width = in.Number(1, kLargestSize, "a width");
  value.channels = in.Number(1, kLargestSize, "a number of channels");
  Product({value.height, value.width, value.channels}, "an activation");
  value.wide = in.Number(last, last, "whether an activation is int32") != 0;
  value.maximum = in.Number(1, 255, "a largest q");
  const int64_t zeros = in.Number(1, image ? value.channels : 1, "a number of zero points");
  Require(zeros == 1 || zeros == value.channels, "its image has too few zero points");
  const uint8_t* zero = in.Bytes(zeros);
  value.zero.assign(zero, zero + zeros);
  const int64_t most = value.wide ? 0 : value.maximum;
  for (const uint8_t z : value.zero) Require(z <= most, "a zero point is outside of its grid");
  return value;
}

void ReadWindow(Reader& in, ProgramOperation& operation) {
  for (auto* pair : {operation.window, operation.strides, operation.dilation}) {
    for (int d = 0; d < 2; ++d) pair[d] = in.Number(1, kLargestSize, "a window's size");
  }
  for (auto& pair : operation.padding) {
    for (int64_t& side : pair) side = in.Number(0, kMostPadding, "a padding");
  }
}

void ReadKernel(Reader& in, const ProgramValue& source, const ProgramValue& output,
                ProgramOperation& operation) {
  operation.groups = in.Number(1, source.channels, "a number of groups");
  operation.center = in.Number(0, 1, "whether sums are centred") != 0;
  Require(source.channels % operation.groups == 0 && output.channels % operation.groups == 0,
          "groups do not divide the channels");
  const int64_t size = Product({operation.window[0], operation.window[1],
                                source.channels / operation.groups, output.channels},
                               "a kernel");
  const uint8_t* kernel = in.Bytes(size);
  operation.kernel.assign(kernel, kernel + size);
}

void ReadRequantization(Reader& in, const ProgramSpec& program, const ProgramValue& output,
                        ProgramRequantization& each) {
  Require(in.left() / 12 >= output.channels, "its bytes end too early");
  each.multiplier.resize(output.channels);
  each.bias.resize(output.channels);
  for (int32_t& m : each.multiplier) m = static_cast<int32_t>(in.Bits(4));
  for (int64_t& b : each.bias) b = in.Number();
  each.shift = in.Number(0, 62, "a shift");
  const int64_t least = output.wide ? INT32_MIN : 0;
  const int64_t most = output.wide ? INT32_MAX : output.maximum;
  each.low = in.Number(least, most, "a low bound");
  each.high = in.Number(each.low, most, "a high bound");
  const int64_t count = in.Number(0, in.left() / 24, "a number of residuals");
  for (int64_t i = 0; i < count; ++i) {
    ProgramResidual residual;
    residual.value = in.Number(0, program.values.size() - 1, "a residual");
    residual.multiplier = in.Number(-INT32_MAX, INT32_MAX, "a residual's multiplier");
    residual.left_shift = in.Number(0, 22, "a residual's shift");
    const ProgramValue& added = program.values[residual.value];
    Require(added.height == output.height && added.width == output.width &&
                added.channels == output.channels,
            "a residual is of another shape");
    each.residuals.push_back(residual);
  }
}

void CheckShape(const ProgramOperation& operation, const ProgramValue& source,
                const ProgramValue& output) {
  const bool product = operation.is_product();
  if (operation.kind == ProgramKind::kReshape) {
    Require(source.size() == output.size(), "a reshape changes the number of elements");
    Require(source.zero.size() == 1, "a reshape's input has zero points of each channel");
    return;
  }
  Require(product || source.channels == output.channels, "an operation changes the channels");
  const int64_t in[] = {source.height, source.width}, out[] = {output.height, output.width};
  for (int d = 0; d < 2; ++d) {
    int64_t span;
    Require(!__builtin_mul_overflow(operation.window[d] - 1, operation.dilation[d], &span),
            "a window is too large");
    const int64_t room = in[d] + operation.padding[d][0] + operation.padding[d][1] - span - 1;
    Require(room >= 0, "a window does not fit its input");
    Require(room / operation.strides[d] + 1 == out[d], "a result is of another shape");
    if (operation.kind == ProgramKind::kMaxPool) {
      for (const int64_t side : operation.padding[d]) {
        Require(side < operation.window[d], "a padding is not smaller than its window");
      }
    }
  }
}

void SetBounds(const ProgramValue& source, const ProgramValue& output,
               ProgramOperation& operation) {
  const int64_t features = output.channels, taps = operation.taps();
  operation.least.assign(features, 0);
  operation.most.assign(features, source.maximum);
  if (operation.kind == ProgramKind::kSumPool) {
    __int128 most = __int128{taps} * source.maximum;
    Require(most <= INT32_MAX, "sums do not fit int32");
    operation.most.assign(features, static_cast<int64_t>(most));
  }
  if (!operation.is_product()) return;
  operation.most.assign(features, 0);
  const bool adder = operation.kind == ProgramKind::kAdder;
  for (size_t i = 0; i < operation.kernel.size();) {
    for (int64_t f = 0; f < features; ++f, ++i) {
      if (adder) {
        const int64_t w = operation.kernel[i];
        operation.most[f] += std::max(w, source.maximum - w);
      } else {
        const int64_t w = static_cast<int8_t>(operation.kernel[i]) * source.maximum;
        (w < 0 ? operation.least : operation.most)[f] += w;
      }
    }
  }
}

void CheckSums(const ProgramSpec& program, const ProgramOperation& operation) {
  const ProgramRequantization& each = operation.requantization;
  __int128 least = *std::min_element(operation.least.begin(), operation.least.end());
  __int128 most = *std::max_element(operation.most.begin(), operation.most.end());
  least = std::min<__int128>(least, 0);
  if (operation.center) {
    most = __int128(operation.most.size() - 1) * (most - least);
    least = -most;
  }
  Require(least >= INT32_MIN && most <= INT32_MAX, "sums do not fit int32");
  __int128 multiplier = 0, bias = 0;
  for (const int32_t m : each.multiplier) multiplier = std::max(multiplier, __int128{m < 0 ? -int64_t{m} : m});
  for (const int64_t b : each.bias) bias = std::max(bias, b < 0 ? -__int128{b} : __int128{b});
  __int128 largest = std::max(-least, most) * multiplier + bias;
  for (const ProgramResidual& residual : each.residuals) {
    const int64_t size = residual.multiplier < 0 ? -residual.multiplier : residual.multiplier;
    largest += (__int128{program.values[residual.value].maximum} * size) << residual.left_shift;
    Require(largest < kLargestValue, "its sums could pass 2^62");
  }
  Require(largest < kLargestValue, "its sums could pass 2^62");
}

void ReadOperation(Reader& in, bool last, ProgramSpec& program) {
  ProgramOperation operation;
  operation.kind = static_cast<ProgramKind>(in.Number(0, 5, "an operation's kind"));
  operation.input = in.Number(0, program.values.size() - 1, "an operation's input");
  const ProgramValue output = ReadValue(in, false, last), &source = program.values[operation.input];
  Require(!last || operation.has_sums(), "the last operation gives no int32");
  if (operation.is_product() || operation.kind == ProgramKind::kSumPool ||
      operation.kind == ProgramKind::kMaxPool) {
    ReadWindow(in, operation);
  }
  if (operation.is_product()) ReadKernel(in, source, output, operation);
  CheckShape(operation, source, output);
  if (operation.has_sums()) {
    ReadRequantization(in, program, output, operation.requantization);
    SetBounds(source, output, operation);
    CheckSums(program, operation);
  } else {
    Require(source.zero == output.zero && source.maximum == output.maximum,
            "a result is not on its input's grid");
  }
  program.operations.push_back(std::move(operation));
  program.values.push_back(output);
}

}  // namespace

ProgramSpec ReadProgram(const uint8_t* bytes, int64_t size) {
  constexpr int64_t kHead = 8 + 8 + 4;  // magic, version, checksum of the rest
  Reader head(bytes, size);
  Require(size >= kHead && std::memcmp(head.Bytes(8), kMagic, 8) == 0, "not one");
  head.Number(kVersion, kVersion, "its version");
  const uint32_t checksum = static_cast<uint32_t>(head.Bits(4));
  Require(Crc32(bytes + kHead, size - kHead) == checksum, "its bytes are damaged");
  Reader in(bytes + kHead, size - kHead);
  ProgramSpec program;
  program.values.push_back(ReadValue(in, true, false));
  const int64_t count = in.Number(1, in.left(), "a number of operations");
  for (int64_t i = 0; i < count; ++i) ReadOperation(in, i + 1 == count, program);
  Require(in.left() == 0, "bytes after its end");
  return program;
}

std::vector<uint8_t> DecodeBase64(const char* text, int64_t size) {
  static const std::array<int8_t, 256> values = [] {
    std::array<int8_t, 256> made;
    made.fill(-1);
    const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0; i < 64; ++i) made[static_cast<uint8_t>(digits[i])] = static_cast<int8_t>(i);
    return made;
  }();
  Require(size % 4 == 0, "not in base64");
  int64_t padding = 0;
  while (padding < 2 && padding < size && text[size - 1 - padding] == '=') ++padding;
  std::vector<uint8_t> bytes(size / 4 * 3);
  for (int64_t i = 0; i < size; i += 4) {
    uint32_t word = 0;
    for (int64_t j = i; j < i + 4; ++j) {
      const int value = j >= size - padding ? 0 : values[static_cast<uint8_t>(text[j])];
      Require(value >= 0, "not in base64");
      word = word << 6 | static_cast<uint32_t>(value);
    }
    for (int j = 0; j < 3; ++j) bytes[i / 4 * 3 + j] = static_cast<uint8_t>(word >> (16 - 8 * j));
  }
  bytes.resize(bytes.size() - padding);
  return bytes;
}

}  // namespace jadder
