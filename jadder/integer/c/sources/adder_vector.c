/* Sums of distances of one window and four filters, 16 bytes at a time. Weights lie in the order of
   their use, 16 bytes of each of four filters in turn. Where a run does not end with 16 bytes, its
   weights go on with zeros, and what is read behind it is masked. */
#if defined(__SSE2__) || defined(__ARM_NEON)
static const uint8_t inside[32] = {255, 255, 255, 255, 255, 255, 255, 255,
                                   255, 255, 255, 255, 255, 255, 255, 255};
#endif

#if defined(__AVX2__)
typedef struct {
  __m256i sums[2];
} Distances;

static inline void distances_begin(Distances *d) {
  d->sums[0] = d->sums[1] = _mm256_setzero_si256();
}

static inline __m128i sixteen(const uint8_t *x) {
  return _mm_loadu_si128((const __m128i *)(const void *)x);
}

static inline void distances_of(Distances *d, __m128i x, const uint8_t *weights) {
  __m256i both = _mm256_broadcastsi128_si256(x);
  for (int i = 0; i < 2; ++i) {
    __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)(weights + 32 * i));
    d->sums[i] = _mm256_add_epi64(d->sums[i], _mm256_sad_epu8(both, w));
  }
}

static inline void distances_add(Distances *d, const uint8_t *x, int32_t chunks,
                                 const uint8_t *weights) {
  for (int32_t i = 0; i < chunks; ++i) distances_of(d, sixteen(x + 16 * i), weights + 64 * i);
}

static inline void distances_last(Distances *d, const uint8_t *x, int32_t rest,
                                  const uint8_t *weights) {
  distances_of(d, _mm_and_si128(sixteen(x), sixteen(inside + 16 - rest)), weights);
}

static inline void distances_end(const Distances *d, int32_t *sums) {
  for (int i = 0; i < 2; ++i) {
    __m256i both = _mm256_add_epi64(d->sums[i], _mm256_srli_si256(d->sums[i], 8));
    sums[2 * i] = _mm_cvtsi128_si32(_mm256_castsi256_si128(both));
    sums[2 * i + 1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(both, 1));
  }
}
#elif defined(__SSE2__)
typedef struct {
  __m128i sums[4];
} Distances;

static inline void distances_begin(Distances *d) {
  for (int f = 0; f < 4; ++f) d->sums[f] = _mm_setzero_si128();
}

static inline __m128i sixteen(const uint8_t *x) {
  return _mm_loadu_si128((const __m128i *)(const void *)x);
}

static inline void distances_of(Distances *d, __m128i x, const uint8_t *weights) {
  for (int f = 0; f < 4; ++f) {
    d->sums[f] = _mm_add_epi64(d->sums[f], _mm_sad_epu8(x, sixteen(weights + 16 * f)));
  }
}

static inline void distances_add(Distances *d, const uint8_t *x, int32_t chunks,
                                 const uint8_t *weights) {
  for (int32_t i = 0; i < chunks; ++i) distances_of(d, sixteen(x + 16 * i), weights + 64 * i);
}

static inline void distances_last(Distances *d, const uint8_t *x, int32_t rest,
                                  const uint8_t *weights) {
  distances_of(d, _mm_and_si128(sixteen(x), sixteen(inside + 16 - rest)), weights);
}

static inline void distances_end(const Distances *d, int32_t *sums) {
  for (int f = 0; f < 4; ++f) {
    sums[f] = _mm_cvtsi128_si32(_mm_add_epi64(d->sums[f], _mm_srli_si128(d->sums[f], 8)));
  }
}
#elif defined(__ARM_NEON)
typedef struct {
  uint16x8_t narrow[4]; /* two distances are added to each at a time: full after 128 times */
  uint32x4_t sums[4];
  int32_t times;
} Distances;

static inline void distances_widen(Distances *d) {
  for (int f = 0; f < 4; ++f) {
    d->sums[f] = vpadalq_u16(d->sums[f], d->narrow[f]);
    d->narrow[f] = vdupq_n_u16(0);
  }
  d->times = 0;
}

static inline void distances_begin(Distances *d) {
  for (int f = 0; f < 4; ++f) {
    d->narrow[f] = vdupq_n_u16(0);
    d->sums[f] = vdupq_n_u32(0);
  }
  d->times = 0;
}

static inline void distances_of(Distances *d, uint8x16_t x, const uint8_t *weights) {
  for (int f = 0; f < 4; ++f) {
    d->narrow[f] = vpadalq_u8(d->narrow[f], vabdq_u8(x, vld1q_u8(weights + 16 * f)));
  }
}

static inline void distances_add(Distances *d, const uint8_t *x, int32_t chunks,
                                 const uint8_t *weights) {
  if (d->times + chunks > 128) distances_widen(d);
  d->times += chunks;
  for (int32_t i = 0; i < chunks; ++i) distances_of(d, vld1q_u8(x + 16 * i), weights + 64 * i);
}

static inline void distances_last(Distances *d, const uint8_t *x, int32_t rest,
                                  const uint8_t *weights) {
  if (++d->times > 128) {
    distances_widen(d);
    d->times = 1;
  }
  distances_of(d, vandq_u8(vld1q_u8(x), vld1q_u8(inside + 16 - rest)), weights);
}

static inline void distances_end(Distances *d, int32_t *sums) {
  distances_widen(d);
  for (int f = 0; f < 4; ++f) sums[f] = (int32_t)vaddvq_u32(d->sums[f]);
}
#else
typedef struct {
  int32_t sums[4];
} Distances;

static inline void distances_begin(Distances *d) { memset(d, 0, sizeof *d); }

static inline void distances_last(Distances *d, const uint8_t *x, int32_t rest,
                                  const uint8_t *weights) {
  for (int f = 0; f < 4; ++f) {
    for (int32_t i = 0; i < rest; ++i) {
      int32_t difference = x[i] - weights[16 * f + i];
      d->sums[f] += difference < 0 ? -difference : difference;
    }
  }
}

static inline void distances_add(Distances *d, const uint8_t *x, int32_t chunks,
                                 const uint8_t *weights) {
  for (int32_t i = 0; i < chunks; ++i) distances_last(d, x + 16 * i, 16, weights + 64 * i);
}

static inline void distances_end(const Distances *d, int32_t *sums) {
  memcpy(sums, d->sums, sizeof d->sums);
}
#endif

static void adder_vector(const Windows *windows, const uint8_t *x, const uint8_t *weights,
                         int32_t *sums, const Requantization *each, const Residual *residuals,
                         const Output *output) {
  for (int32_t y = 0; y < windows->height; ++y) {
    for (int32_t u = 0; u < windows->width; ++u) {
      const uint8_t *corner = x + y * windows->row + u * windows->pixel;
      const uint8_t *w = weights;
      for (int32_t f = 0; f < each->features; f += 4) {
        Distances d;
        distances_begin(&d);
        for (int32_t i = 0; i < windows->taps_down; ++i) {
          for (int32_t j = 0; j < windows->taps_across; ++j) {
            const uint8_t *from = corner + i * windows->tap_row + j * windows->tap_pixel;
            int32_t rest = windows->run;
            while (rest >= 16) {
              int32_t chunks = rest < 1024 ? rest / 16 : 64;
              distances_add(&d, from, chunks, w);
              from += 16 * chunks;
              w += 64 * chunks;
              rest -= 16 * chunks;
            }
            if (rest) {
              distances_last(&d, from, rest, w);
              w += 64;
            }
          }
        }
        distances_end(&d, sums + f);
      }
      finish(each, sums, residuals, y, u, windows->width, output);
    }
  }
}
