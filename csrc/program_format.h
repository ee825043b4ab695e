// Integer programs as jadder.integer.native writes them: read and checked.
//
// The bytes come from files and networks. All that runs later relies on what is checked here:
// indices, shapes, and bounds of every sum, under the conditions of jadder.integer.program.check.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace jadder {

// Why a program cannot be run.
struct ProgramError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct ProgramValue {
  int64_t height, width, channels;
  int64_t maximum = 255;
  bool wide = false;          // int32 instead of uint8
  std::vector<uint8_t> zero;  // the zero point, one or of each channel

  int64_t size() const { return height * width * channels; }
  int64_t positions() const { return height * width; }
};

struct ProgramResidual {
  int64_t value, multiplier, left_shift;
};

struct ProgramRequantization {
  std::vector<int32_t> multiplier;
  std::vector<int64_t> bias;
  int64_t shift, low, high;
  std::vector<ProgramResidual> residuals;
};

enum class ProgramKind { kAdder, kMultiply, kSumPool, kMaxPool, kRescale, kReshape };

struct ProgramOperation {
  ProgramKind kind;
  int64_t input;
  int64_t window[2] = {1, 1}, strides[2] = {1, 1}, padding[2][2] = {}, dilation[2] = {1, 1};
  int64_t groups = 1;
  bool center = false;
  std::vector<uint8_t> kernel;  // (height, width, channels of a group, features), int8 as bits
  ProgramRequantization requantization;
  std::vector<int64_t> least, most;  // of each channel's sum, before centring

  bool is_product() const { return kind == ProgramKind::kAdder || kind == ProgramKind::kMultiply; }
  bool has_sums() const { return kind != ProgramKind::kMaxPool && kind != ProgramKind::kReshape; }
  int64_t taps() const { return window[0] * window[1]; }
};

struct ProgramSpec {
  std::vector<ProgramValue> values;  // the image, then each operation's result
  std::vector<ProgramOperation> operations;
};

// Throws ProgramError.
ProgramSpec ReadProgram(const uint8_t* bytes, int64_t size);

// The same from base64 without line breaks, as XLA's text carries attributes.
std::vector<uint8_t> DecodeBase64(const char* text, int64_t size);

}  // namespace jadder
