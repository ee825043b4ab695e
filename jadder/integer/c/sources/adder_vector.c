/* Sums of distances of one window and four filters, 16 bytes at a time. Weights lie in the order of
   their use, 16 bytes of each of four filters in turn. Where a run does not end with 16 bytes, its
   weights go on with zeros, and what is read behind it is masked. */
static const uint8_t inside[32] = {255, 255, 255, 255, 255, 255, 255, 255,
                                   255, 255, 255, 255, 255, 255, 255, 255};

#if defined(__AVX2__)
typedef struct {
  __m256i sums[2];
} Distances;

static inline void distances_begin(Distances *d) {
  d->sums[0] = d->sums[1] = _mm256_setzero_si256();
}

static inline void distances_add(Distances *d, const uint8_t *x, int32_t rest,
                                 const uint8_t *weights) {
  __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)x);
  if (rest < 16) {
    const uint8_t *mask = inside + 16 - rest;
    bytes = _mm_and_si128(bytes, _mm_loadu_si128((const __m128i *)(const void *)mask));
  }
  __m256i both = _mm256_broadcastsi128_si256(bytes);
  for (int i = 0; i < 2; ++i) {
    __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)(weights + 32 * i));
    d->sums[i] = _mm256_add_epi64(d->sums[i], _mm256_sad_epu8(both, w));
  }
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

static inline void distances_add(Distances *d, const uint8_t *x, int32_t rest,
                                 const uint8_t *weights) {
  __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)x);
  if (rest < 16) {
    const uint8_t *mask = inside + 16 - rest;
    bytes = _mm_and_si128(bytes, _mm_loadu_si128((const __m128i *)(const void *)mask));
  }
  for (int f = 0; f < 4; ++f) {
    __m128i w = _mm_loadu_si128((const __m128i *)(const void *)(weights + 16 * f));
    d->sums[f] = _mm_add_epi64(d->sums[f], _mm_sad_epu8(bytes, w));
  }
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

static inline void distances_add(Distances *d, const uint8_t *x, int32_t rest,
                                 const uint8_t *weights) {
  uint8x16_t bytes = vld1q_u8(x);
  if (rest < 16) bytes = vandq_u8(bytes, vld1q_u8(inside + 16 - rest));
  for (int f = 0; f < 4; ++f) {
    d->narrow[f] = vpadalq_u8(d->narrow[f], vabdq_u8(bytes, vld1q_u8(weights + 16 * f)));
  }
  if (++d->times == 128) distances_widen(d);
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

static inline void distances_add(Distances *d, const uint8_t *x, int32_t rest,
                                 const uint8_t *weights) {
  for (int f = 0; f < 4; ++f) {
    for (int32_t i = 0; i < rest && i < 16; ++i) {
      int32_t difference = x[i] - weights[16 * f + i];
      d->sums[f] += difference < 0 ? -difference : difference;
    }
  }
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
            for (int32_t rest = windows->run; rest > 0; rest -= 16, from += 16, w += 64) {
              distances_add(&d, from, rest, w);
            }
          }
        }
        distances_end(&d, sums + f);
      }
      finish(each, sums, residuals, y, u, windows->width, output);
    }
  }
}
