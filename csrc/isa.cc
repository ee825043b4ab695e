// Which instruction set's kernels to run.

#include <cstdlib>
#include <cstring>

#include "integers.h"
#include "kernels.h"
#include "normalize_kernels.h"
#include "program_kernels.h"

namespace jadder {
namespace {

// Levels: 0 baseline, 1 AVX2 with FMA, 2 AVX-512 F, DQ, BW and VL, 3 with VNNI.
int SupportedLevel() {
#if defined(JADDER_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return 1;
  return __builtin_cpu_supports("avx512vnni") ? 3 : 2;
#else
  return 0;
#endif
}

int WantedLevel() {
  const char* name = std::getenv("JADDER_CPU_ISA");
  if (name == nullptr) return 3;
  if (std::strcmp(name, "baseline") == 0) return 0;
  if (std::strcmp(name, "avx2") == 0) return 1;
  if (std::strcmp(name, "avx512") == 0) return 2;
  return 3;
}

int Level() {
  static const int supported = SupportedLevel(), wanted = WantedLevel();
  return supported < wanted ? supported : wanted;
}

}  // namespace

const Kernels& SelectKernels() {
#if defined(JADDER_X86)
  if (Level() == 3) return avx512vnni::kKernels;
  if (Level() == 2) return avx512::kKernels;
  if (Level() == 1) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

const IntegerKernels& SelectIntegerKernels() {
#if defined(JADDER_X86)
  if (Level() >= 2) return avx512::kIntegerKernels;
  if (Level() == 1) return avx2::kIntegerKernels;
#endif
  return baseline::kIntegerKernels;
}

const NormalizeKernels& SelectNormalizeKernels() {
#if defined(JADDER_X86)
  if (Level() >= 2) return avx512::kNormalizeKernels;
  if (Level() == 1) return avx2::kNormalizeKernels;
#endif
  return baseline::kNormalizeKernels;
}

const ProgramKernels& SelectProgramKernels() {
#if defined(JADDER_X86)
  if (Level() == 3) return avx512vnni::kProgramKernels;
  if (Level() == 2) return avx512::kProgramKernels;
  if (Level() == 1) return avx2::kProgramKernels;
#endif
  return baseline::kProgramKernels;
}

}  // namespace jadder
