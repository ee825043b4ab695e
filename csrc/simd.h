// One vector of floats, for the instruction set that this translation unit is compiled for, and
// the terms that the products add up.
//
// What limits a term is the number of operations and the units that take them. Current x86 cores
// have two units for fused multiply-adds and two for additions, comparisons and minima, so the
// subtraction of every other term (template argument `kOdd`) is written as -x · 1 + w, which rounds
// in the same way: the three operations of a term then keep all four units busy.

#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#if defined(__AVX512VNNI__)
#define JADDER_ISA avx512vnni
#else
#define JADDER_ISA avx512
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define JADDER_ISA avx2
#else
#define JADDER_ISA baseline
#endif

#define JADDER_NAME_(isa) #isa
#define JADDER_NAME(isa) JADDER_NAME_(isa)
#define JADDER_INLINE inline __attribute__((always_inline))

namespace jadder::JADDER_ISA {

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)

using Vec = __m512;
inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;

JADDER_INLINE Vec Load(const float* p) { return _mm512_loadu_ps(p); }
JADDER_INLINE Vec LoadFirst(const float* p, int64_t count) {  // zeros in the lanes after those
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
JADDER_INLINE void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
JADDER_INLINE void StoreFirst(float* p, int64_t count, Vec v) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
}
JADDER_INLINE Vec Broadcast(float v) { return _mm512_set1_ps(v); }
JADDER_INLINE Vec Sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
JADDER_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
JADDER_INLINE Vec SubOnFma(Vec a, Vec b, Vec one) { return _mm512_fnmadd_ps(b, one, a); }
JADDER_INLINE Vec Abs(Vec a) { return _mm512_abs_ps(a); }
JADDER_INLINE Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
JADDER_INLINE Vec Min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
JADDER_INLINE float HorizontalSum(Vec a) { return _mm512_reduce_add_ps(a); }
JADDER_INLINE bool AnyNan(Vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
JADDER_INLINE Vec WherePositive(Vec a, Vec b) {  // b, or zero where a is not positive
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ), b);
}

// min(|d|, bound) with d's sign, in one instruction. NaN turns into the bound.
JADDER_INLINE Vec ClipFinite(Vec d, Vec bound) { return _mm512_range_ps(d, bound, 2); }

// Both instructions return their second operand where one is NaN.
JADDER_INLINE Vec ClipExact(Vec d, Vec bound) {
  return _mm512_max_ps(Sub(_mm512_setzero_ps(), bound), _mm512_min_ps(bound, d));
}

JADDER_INLINE Vec AddSigned(Vec sum, Vec w, Vec x, Vec g) {  // NaN differences add ±g
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  const __m512i one = _mm512_castps_si512(_mm512_set1_ps(1));
  const __mmask16 differ = _mm512_cmp_ps_mask(w, x, _CMP_NEQ_UQ);
  const __m512i d = _mm512_castps_si512(Sub(w, x));
  // The sign bit of d and the other bits of one; zero where equal, so that infinite g makes NaN.
  return Fma(_mm512_castsi512_ps(_mm512_maskz_ternarylogic_epi32(differ, d, one, sign, 0xe4)), g,
             sum);
}

JADDER_INLINE Vec SignExact(Vec d) {
  const Vec zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1);
  Vec sign = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(d, zero, _CMP_GT_OQ), one);
  sign = _mm512_mask_mov_ps(sign, _mm512_cmp_ps_mask(d, zero, _CMP_LT_OQ), _mm512_set1_ps(-1));
  return _mm512_mask_mov_ps(sign, _mm512_cmp_ps_mask(d, d, _CMP_UNORD_Q), d);
}

// Pairs of 16-bit integers in the lanes of a vector of floats.
JADDER_INLINE __m512i Bits(Vec a) { return _mm512_castps_si512(a); }
JADDER_INLINE Vec FromBits(__m512i a) { return _mm512_castsi512_ps(a); }
JADDER_INLINE Vec MaxPairs(Vec a, Vec b) { return FromBits(_mm512_max_epi16(Bits(a), Bits(b))); }
JADDER_INLINE Vec MinPairs(Vec a, Vec b) { return FromBits(_mm512_min_epi16(Bits(a), Bits(b))); }
JADDER_INLINE Vec AddPairs(Vec a, Vec b) { return FromBits(_mm512_add_epi16(Bits(a), Bits(b))); }
JADDER_INLINE Vec SubPairs(Vec a, Vec b) { return FromBits(_mm512_sub_epi16(Bits(a), Bits(b))); }
JADDER_INLINE Vec MultiplyPairs(Vec a, Vec b) {  // the sum of both products, in 32 bits
  return FromBits(_mm512_madd_epi16(Bits(a), Bits(b)));
}
JADDER_INLINE Vec AddIntegers(Vec a, Vec b) { return FromBits(_mm512_add_epi32(Bits(a), Bits(b))); }
JADDER_INLINE Vec AddProducts(Vec sum, Vec a, Vec b) {  // MultiplyPairs in AddIntegers
#if defined(__AVX512VNNI__)
  // With the intrinsic, GCC moves the sum to another register and back.
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  return AddIntegers(sum, MultiplyPairs(a, b));
#endif
}
// Of the lanes 0, 1, 4, 5 and so on of `a` and `b`, in turns; High: of the others.
JADDER_INLINE Vec UnpackLow(Vec a, Vec b) {
  return FromBits(_mm512_unpacklo_epi32(Bits(a), Bits(b)));
}
JADDER_INLINE Vec UnpackHigh(Vec a, Vec b) {
  return FromBits(_mm512_unpackhi_epi32(Bits(a), Bits(b)));
}
JADDER_INLINE Vec AddNeighbours(Vec low, Vec high) {  // a + b, of what was unpacked
  return AddIntegers(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xdd));
}
JADDER_INLINE Vec BroadcastTwo(const float* p) {  // p[0], p[1], p[0], ...
  int64_t both;  // an instruction for floats would make those for integers wait
  __builtin_memcpy(&both, p, sizeof both);
  return FromBits(_mm512_set1_epi64(both));
}
JADDER_INLINE Vec ToFloats(Vec a) { return _mm512_cvtepi32_ps(Bits(a)); }
JADDER_INLINE Vec ToIntegers(Vec a) { return FromBits(_mm512_cvtps_epi32(a)); }
JADDER_INLINE Vec PairOf(Vec low, Vec high) {  // of integers that fit
  return FromBits(_mm512_mask_mov_epi16(Bits(low), 0xaaaaaaaa, _mm512_slli_epi32(Bits(high), 16)));
}
JADDER_INLINE void StoreHalves(int16_t* p, Vec a) {  // of integers that fit
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(Bits(a)));
}

#elif defined(__AVX2__) && defined(__FMA__)

using Vec = __m256;
inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;

JADDER_INLINE Vec Load(const float* p) { return _mm256_loadu_ps(p); }
JADDER_INLINE Vec LoadFirst(const float* p, int64_t count) {  // zeros in the lanes after those
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i end = _mm256_set1_epi32(static_cast<int>(count));
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(end, lane));
}
JADDER_INLINE void Store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
JADDER_INLINE void StoreFirst(float* p, int64_t count, Vec v) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i end = _mm256_set1_epi32(static_cast<int>(count));
  _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(end, lane), v);
}
JADDER_INLINE Vec Broadcast(float v) { return _mm256_set1_ps(v); }
JADDER_INLINE Vec Sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
JADDER_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
JADDER_INLINE Vec SubOnFma(Vec a, Vec b, Vec one) { return _mm256_fnmadd_ps(b, one, a); }
JADDER_INLINE Vec Abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
JADDER_INLINE Vec Max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
JADDER_INLINE Vec Min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
JADDER_INLINE float HorizontalSum(Vec a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(sum) + _mm_cvtss_f32(_mm_movehdup_ps(sum));
}
JADDER_INLINE bool AnyNan(Vec a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0;
}
JADDER_INLINE Vec WherePositive(Vec a, Vec b) {  // b, or zero where a is not positive
  return _mm256_and_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ), b);
}

// Both instructions return their second operand where one is NaN.
JADDER_INLINE Vec ClipExact(Vec d, Vec bound) {
  return _mm256_max_ps(Sub(_mm256_setzero_ps(), bound), _mm256_min_ps(bound, d));
}
JADDER_INLINE Vec ClipFinite(Vec d, Vec bound) { return ClipExact(d, bound); }

JADDER_INLINE Vec AddSigned(Vec sum, Vec w, Vec x, Vec g) {  // NaN differences add ±g
  const Vec sign = _mm256_and_ps(Sub(w, x), _mm256_set1_ps(-0.0f));
  const Vec differ = _mm256_cmp_ps(w, x, _CMP_NEQ_UQ);
  // Zero where equal, so that infinite g makes NaN.
  return Fma(_mm256_and_ps(_mm256_or_ps(sign, _mm256_set1_ps(1)), differ), g, sum);
}

JADDER_INLINE Vec SignExact(Vec d) {
  const Vec zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1);
  const Vec sign = Sub(_mm256_and_ps(_mm256_cmp_ps(d, zero, _CMP_GT_OQ), one),
                       _mm256_and_ps(_mm256_cmp_ps(d, zero, _CMP_LT_OQ), one));
  return _mm256_blendv_ps(sign, d, _mm256_cmp_ps(d, d, _CMP_UNORD_Q));
}

// Pairs of 16-bit integers in the lanes of a vector of floats.
JADDER_INLINE __m256i Bits(Vec a) { return _mm256_castps_si256(a); }
JADDER_INLINE Vec FromBits(__m256i a) { return _mm256_castsi256_ps(a); }
JADDER_INLINE Vec MaxPairs(Vec a, Vec b) { return FromBits(_mm256_max_epi16(Bits(a), Bits(b))); }
JADDER_INLINE Vec MinPairs(Vec a, Vec b) { return FromBits(_mm256_min_epi16(Bits(a), Bits(b))); }
JADDER_INLINE Vec AddPairs(Vec a, Vec b) { return FromBits(_mm256_add_epi16(Bits(a), Bits(b))); }
JADDER_INLINE Vec SubPairs(Vec a, Vec b) { return FromBits(_mm256_sub_epi16(Bits(a), Bits(b))); }
JADDER_INLINE Vec MultiplyPairs(Vec a, Vec b) {  // the sum of both products, in 32 bits
  return FromBits(_mm256_madd_epi16(Bits(a), Bits(b)));
}
JADDER_INLINE Vec AddIntegers(Vec a, Vec b) { return FromBits(_mm256_add_epi32(Bits(a), Bits(b))); }
JADDER_INLINE Vec AddProducts(Vec sum, Vec a, Vec b) {  // MultiplyPairs in AddIntegers
  return AddIntegers(sum, MultiplyPairs(a, b));
}
JADDER_INLINE Vec UnpackLow(Vec a, Vec b) {
  return FromBits(_mm256_unpacklo_epi32(Bits(a), Bits(b)));
}
JADDER_INLINE Vec UnpackHigh(Vec a, Vec b) {
  return FromBits(_mm256_unpackhi_epi32(Bits(a), Bits(b)));
}
JADDER_INLINE Vec AddNeighbours(Vec low, Vec high) {
  return AddIntegers(_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xdd));
}
JADDER_INLINE Vec BroadcastTwo(const float* p) {
  int64_t both;  // an instruction for floats would make those for integers wait
  __builtin_memcpy(&both, p, sizeof both);
  return FromBits(_mm256_set1_epi64x(both));
}
JADDER_INLINE Vec ToFloats(Vec a) { return _mm256_cvtepi32_ps(Bits(a)); }
JADDER_INLINE Vec ToIntegers(Vec a) { return FromBits(_mm256_cvtps_epi32(a)); }
JADDER_INLINE Vec PairOf(Vec low, Vec high) {  // of integers that fit
  return FromBits(_mm256_blend_epi16(Bits(low), _mm256_slli_epi32(Bits(high), 16), 0xaa));
}
JADDER_INLINE void StoreHalves(int16_t* p, Vec a) {  // of integers that fit
  const __m128i low = _mm256_castsi256_si128(Bits(a)), high = _mm256_extractf128_si256(Bits(a), 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(low, high));
}

#else

// Four lanes: SSE2 or NEON where the compiler finds them, scalar code elsewhere.
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
typedef float UnalignedVec __attribute__((vector_size(16), aligned(4), may_alias));
inline constexpr int kLanes = 4;
#if defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

JADDER_INLINE Vec Load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
JADDER_INLINE Vec LoadFirst(const float* p, int64_t count) {  // zeros in the lanes after those
  return Vec{count > 0 ? p[0] : 0, count > 1 ? p[1] : 0, count > 2 ? p[2] : 0,
             count > 3 ? p[3] : 0};
}
JADDER_INLINE void Store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
JADDER_INLINE void StoreFirst(float* p, int64_t count, Vec v) {
  for (int i = 0; i < 4 && i < count; ++i) p[i] = v[i];
}
JADDER_INLINE Vec Broadcast(float v) { return Vec{v, v, v, v}; }
JADDER_INLINE Vec Sub(Vec a, Vec b) { return a - b; }
JADDER_INLINE Vec SubOnFma(Vec a, Vec b, Vec) { return a - b; }
JADDER_INLINE Vec Abs(Vec a) { return (Vec)((Mask)a & INT32_MAX); }
JADDER_INLINE float HorizontalSum(Vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }
JADDER_INLINE bool AnyNan(Vec a) {
  const Mask nan = a != a;
  return (nan[0] | nan[1] | nan[2] | nan[3]) != 0;
}
JADDER_INLINE Vec WherePositive(Vec a, Vec b) {  // b, or zero where a is not positive
  return (Vec)((Mask)(a > 0) & (Mask)b);
}
JADDER_INLINE Vec Select(Mask mask, Vec a, Vec b) {
  return (Vec)((mask & (Mask)a) | (~mask & (Mask)b));
}
#if defined(__aarch64__)
JADDER_INLINE Vec Fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32(c, a, b); }
#else
JADDER_INLINE Vec Fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
#if defined(__SSE2__)
JADDER_INLINE Vec Max(Vec a, Vec b) { return _mm_max_ps(a, b); }
JADDER_INLINE Vec Min(Vec a, Vec b) { return _mm_min_ps(a, b); }
// Both instructions return their second operand where one is NaN.
JADDER_INLINE Vec ClipExact(Vec d, Vec bound) { return _mm_max_ps(-bound, _mm_min_ps(bound, d)); }
#elif defined(__aarch64__)
JADDER_INLINE Vec Max(Vec a, Vec b) { return (Vec)vmaxq_f32(a, b); }
JADDER_INLINE Vec Min(Vec a, Vec b) { return (Vec)vminq_f32(a, b); }
JADDER_INLINE Vec ClipExact(Vec d, Vec bound) {
  return (Vec)vmaxq_f32(-bound, vminq_f32(bound, d));
}
#else
JADDER_INLINE Vec Max(Vec a, Vec b) { return Select(a > b, a, b); }
JADDER_INLINE Vec Min(Vec a, Vec b) { return Select(a < b, a, b); }
JADDER_INLINE Vec ClipExact(Vec d, Vec bound) {
  d = Select(d > bound, bound, d);
  return Select(d < -bound, -bound, d);
}
#endif
JADDER_INLINE Vec ClipFinite(Vec d, Vec bound) { return ClipExact(d, bound); }

JADDER_INLINE Vec AddSigned(Vec sum, Vec w, Vec x, Vec g) {  // NaN differences add ±g
  const Mask sign = (Mask)(w - x) & INT32_MIN;
  // Zero where equal, so that infinite g makes NaN.
  return Fma((Vec)((sign | (Mask)Broadcast(1)) & (Mask)(w != x)), g, sum);
}

JADDER_INLINE Vec SignExact(Vec d) {
  const Vec one = Broadcast(1);
  const Vec sign = (Vec)((Mask)(d > 0) & (Mask)one) - (Vec)((Mask)(d < 0) & (Mask)one);
  return Select(d != d, d, sign);
}

// Pairs of 16-bit integers in the lanes of a vector of floats.
typedef int16_t Halves __attribute__((vector_size(16)));
JADDER_INLINE Vec AddPairs(Vec a, Vec b) { return (Vec)((Halves)a + (Halves)b); }
JADDER_INLINE Vec SubPairs(Vec a, Vec b) { return (Vec)((Halves)a - (Halves)b); }
JADDER_INLINE Vec AddIntegers(Vec a, Vec b) { return (Vec)((Mask)a + (Mask)b); }
JADDER_INLINE Vec UnpackLow(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
JADDER_INLINE Vec UnpackHigh(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }
JADDER_INLINE Vec AddNeighbours(Vec low, Vec high) {
  return AddIntegers(Vec{low[0], low[2], high[0], high[2]}, Vec{low[1], low[3], high[1], high[3]});
}
JADDER_INLINE Vec BroadcastTwo(const float* p) { return Vec{p[0], p[1], p[0], p[1]}; }
JADDER_INLINE Vec ToFloats(Vec a) { return __builtin_convertvector((Mask)a, Vec); }
#if defined(__SSE2__)
JADDER_INLINE Vec MaxPairs(Vec a, Vec b) {
  return (Vec)_mm_max_epi16((__m128i)a, (__m128i)b);
}
JADDER_INLINE Vec MinPairs(Vec a, Vec b) {
  return (Vec)_mm_min_epi16((__m128i)a, (__m128i)b);
}
JADDER_INLINE Vec MultiplyPairs(Vec a, Vec b) {  // the sum of both products, in 32 bits
  return (Vec)_mm_madd_epi16((__m128i)a, (__m128i)b);
}
JADDER_INLINE Vec ToIntegers(Vec a) { return (Vec)_mm_cvtps_epi32((__m128)a); }
#else
JADDER_INLINE Vec MaxPairs(Vec a, Vec b) {
  const Halves larger = (Halves)a > (Halves)b;
  return (Vec)((larger & (Halves)a) | (~larger & (Halves)b));
}
JADDER_INLINE Vec MinPairs(Vec a, Vec b) {
  const Halves larger = (Halves)a > (Halves)b;
  return (Vec)((larger & (Halves)b) | (~larger & (Halves)a));
}
JADDER_INLINE Mask EvenHalves(Vec a) { return (Mask)((Mask)a << 16) >> 16; }
JADDER_INLINE Mask OddHalves(Vec a) { return (Mask)a >> 16; }
JADDER_INLINE Vec MultiplyPairs(Vec a, Vec b) {  // the sum of both products, in 32 bits
  return (Vec)(EvenHalves(a) * EvenHalves(b) + OddHalves(a) * OddHalves(b));
}
#if defined(__aarch64__)
JADDER_INLINE Vec ToIntegers(Vec a) { return (Vec)vcvtnq_s32_f32((float32x4_t)a); }
#else
JADDER_INLINE Vec ToIntegers(Vec a) {
  return (Vec)Mask{static_cast<int32_t>(__builtin_rintf(a[0])),
                   static_cast<int32_t>(__builtin_rintf(a[1])),
                   static_cast<int32_t>(__builtin_rintf(a[2])),
                   static_cast<int32_t>(__builtin_rintf(a[3]))};
}
#endif
#endif
JADDER_INLINE Vec AddProducts(Vec sum, Vec a, Vec b) {  // MultiplyPairs in AddIntegers
  return AddIntegers(sum, MultiplyPairs(a, b));
}
JADDER_INLINE Vec PairOf(Vec low, Vec high) {  // of integers that fit
  return (Vec)(((Mask)low & 0xffff) | ((Mask)high << 16));
}
JADDER_INLINE void StoreHalves(int16_t* p, Vec a) {  // of integers that fit
  for (int i = 0; i < 4; ++i) p[i] = static_cast<int16_t>(((Mask)a)[i]);
}

#endif

// AddProducts with a pair that lies in memory.
JADDER_INLINE Vec AddBroadcastProducts(Vec sum, Vec a, const float* pair) {
#if defined(__AVX512VNNI__)
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*pair));
  return sum;
#else
  return AddProducts(sum, a, Broadcast(*pair));
#endif
}

// `a - b` on whichever unit is due.
template <bool kOdd>
JADDER_INLINE Vec Difference(Vec a, Vec b, Vec one) {
  return kOdd ? SubOnFma(a, b, one) : Sub(a, b);
}

// The terms: `sum` plus one term, for the broadcast operand `row` and the panel's vector `lane`.

struct AbsTerm {
  template <bool kOdd>
  JADDER_INLINE static Vec Add(Vec sum, Vec row, Vec lane, Vec one) {
    const Vec magnitude = Abs(Difference<kOdd>(lane, row, one));
    return kOdd ? sum + magnitude : Fma(magnitude, one, sum);
  }
};

struct MaxTerm {
  template <bool>
  JADDER_INLINE static Vec Add(Vec sum, Vec row, Vec lane, Vec one) {
    return Fma(Max(lane, row), one, sum);
  }
};

// The difference and the product have units of their own: neither is worth moving.
struct SquareTerm {
  template <bool>
  JADDER_INLINE static Vec Add(Vec sum, Vec row, Vec lane, Vec) {
    const Vec difference = Sub(lane, row);
    return Fma(difference, difference, sum);
  }
};

// The terms of gradients, with ψ of `lane - target`; ClipTerm and SignTerm need finite operands.

struct LinearTerm {
  template <bool>
  JADDER_INLINE static Vec Add(Vec sum, Vec target, Vec lane, Vec row, Vec, Vec) {
    return Fma(Sub(lane, target), row, sum);
  }
};

struct ClipTerm {
  template <bool kOdd>
  JADDER_INLINE static Vec Add(Vec sum, Vec target, Vec lane, Vec row, Vec one, Vec bound) {
    return Fma(ClipFinite(Difference<kOdd>(lane, target, one), bound), row, sum);
  }
};

struct SignTerm {
  template <bool>
  JADDER_INLINE static Vec Add(Vec sum, Vec target, Vec lane, Vec row, Vec, Vec) {
    return AddSigned(sum, lane, target, row);
  }
};

struct ExactClipTerm {
  template <bool>
  JADDER_INLINE static Vec Add(Vec sum, Vec target, Vec lane, Vec row, Vec, Vec bound) {
    return Fma(ClipExact(Sub(lane, target), bound), row, sum);
  }
};

struct ExactSignTerm {
  template <bool>
  JADDER_INLINE static Vec Add(Vec sum, Vec target, Vec lane, Vec row, Vec, Vec) {
    return Fma(SignExact(Sub(lane, target)), row, sum);
  }
};

}  // namespace jadder::JADDER_ISA
