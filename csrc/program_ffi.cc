// The foreign call that runs an integer program.
//
// XLA instantiates a call once, when a program of its own is compiled or loaded: then the integer
// program is read and its weights are packed. Each execution finds it as the call's state.

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "program.h"
#include "xla/ffi/api/ffi.h"
#include "xla_calls.h"

namespace jadder {
namespace {

namespace ffi = xla::ffi;

struct ProgramState {
  static ffi::TypeId id;
  Program program;

  explicit ProgramState(ProgramSpec spec) : program(std::move(spec), SelectProgramKernels()) {}
};

ffi::TypeId ProgramState::id = {};
const XLA_FFI_TypeInfo kStateInfo = ffi::MakeTypeInfo<ProgramState>();

ffi::Error Invalid(std::string why) { return ffi::Error::InvalidArgument(std::move(why)); }

ffi::Error OutOfMemory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jadder: out of memory");
}

ffi::ErrorOr<std::unique_ptr<ProgramState>> Instantiate(ffi::Dictionary attributes) {
  const ffi::ErrorOr<std::string_view> program = attributes.get<std::string_view>("program");
  if (!program.has_value()) return ffi::Unexpected(program.error());
  try {
    const auto bytes = DecodeBase64(program->data(), program->size());
    return std::make_unique<ProgramState>(ReadProgram(bytes.data(), bytes.size()));
  } catch (const ProgramError& error) {
    return ffi::Unexpected(Invalid(std::string("jadder: ") + error.what()));
  } catch (const std::bad_alloc&) {
    return ffi::Unexpected(OutOfMemory());
  }
}

// Whether the last dimensions are the value's, and how many there are of it.
bool Matches(const ProgramValue& value, ffi::AnyBuffer::Dimensions dimensions, int64_t& count) {
  const size_t rank = dimensions.size();
  if (rank < 3 || dimensions[rank - 3] != value.height || dimensions[rank - 2] != value.width ||
      dimensions[rank - 1] != value.channels) {
    return false;
  }
  count = 1;
  for (size_t d = 0; d + 3 < rank; ++d) count = CheckedProduct(count, dimensions[d]);
  return true;
}

// Integers where they lie as floats, of as many bytes, times the scale.
void Scale(float scale, int64_t count, void* numbers) {
  char* at = static_cast<char*>(numbers);
  for (int64_t i = 0; i < count; ++i, at += sizeof(float)) {
    int32_t whole;
    std::memcpy(&whole, at, sizeof(whole));
    const float value = static_cast<float>(whole) * scale;
    std::memcpy(at, &value, sizeof(value));
  }
}

// Outputs are int32, or float32 if there is an attribute `scale`, which they are times.
ffi::Error Execute(ProgramState* state, ffi::ThreadPool threads, ffi::Buffer<ffi::U8> images,
                   ffi::Result<ffi::AnyBuffer> outputs, ffi::Dictionary attributes) {
  const Program& program = state->program;
  try {
    int64_t batch, results;
    if (!Matches(program.input(), images.dimensions(), batch) ||
        !Matches(program.output(), outputs->dimensions(), results) || batch != results) {
      return Invalid("jadder: images or outputs are not those of the integer program");
    }
    const ffi::ErrorOr<float> scale = attributes.get<float>("scale");
    if (outputs->element_type() != (scale.has_value() ? ffi::F32 : ffi::S32)) {
      return Invalid("jadder: outputs of an integer program must be int32, or float32 with a scale");
    }
    XlaPool pool(threads);
    program.Run(pool, images.typed_data(), batch, static_cast<int32_t*>(outputs->untyped_data()));
    if (scale.has_value()) Scale(*scale, outputs->element_count(), outputs->untyped_data());
  } catch (const std::bad_alloc&) {
    return OutOfMemory();
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate().Attrs());

}  // namespace
}  // namespace jadder

#pragma GCC visibility push(default)

// XLA asks a handler what type its state is when the handler is registered, so the type has to be
// registered first. JAX registers types after handlers where it does both before a client exists.
extern "C" XLA_FFI_Error* jadder_integer_program_instantiate(XLA_FFI_CallFrame* call) {
  using jadder::ProgramState;
  static std::mutex mutex;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (ProgramState::id.type_id == 0) {
      XLA_FFI_Error* error = xla::ffi::Ffi::RegisterTypeId(
          call->api, "jadder_integer_program", &ProgramState::id, &jadder::kStateInfo);
      if (error != nullptr) return error;
    }
  }
  return jadder::kInstantiate(call);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(jadder_integer_program, jadder::Execute,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::State<jadder::ProgramState>>()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attrs());

// The instruction set of integer programs.
extern "C" const char* jadder_integer_program_isa() {
  return jadder::SelectProgramKernels().name;
}

// Why a program cannot run, in at most `room` characters and a zero; or nothing, and 0.
extern "C" int jadder_integer_program_refusal(const uint8_t* bytes, int64_t size, char* why,
                                              int64_t room) {
  std::string text;
  try {
    jadder::ProgramState state(jadder::ReadProgram(bytes, size));
  } catch (const jadder::ProgramError& error) {
    text = error.what();
  } catch (const std::bad_alloc&) {
    text = "out of memory";
  }
  text.copy(why, room);
  why[std::min<int64_t>(room, text.size())] = 0;
  return text.empty() ? 0 : 1;
}

#pragma GCC visibility pop
