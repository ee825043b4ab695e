/* Sums of products of one window and four filters, 16 bytes at a time, with weights of 16 bits in
   the order of their use. Behind the end of a run they are zeros. */
#if defined(__AVX2__)
typedef struct {
  __m256i sums[4];
} Products;

static inline void products_begin(Products *p) {
  for (int f = 0; f < 4; ++f) p->sums[f] = _mm256_setzero_si256();
}

static inline void products_add(Products *p, const uint8_t *x, const int16_t *weights) {
  __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)x));
  for (int f = 0; f < 4; ++f) {
    __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)(weights + 16 * f));
    p->sums[f] = _mm256_add_epi32(p->sums[f], _mm256_madd_epi16(wide, w));
  }
}

static inline void products_end(const Products *p, int32_t *sums) {
  for (int f = 0; f < 4; ++f) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(p->sums[f]),
                                 _mm256_extracti128_si256(p->sums[f], 1));
    four = _mm_add_epi32(four, _mm_srli_si128(four, 8));
    sums[f] = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_srli_si128(four, 4)));
  }
}
#elif defined(__SSE2__)
typedef struct {
  __m128i sums[4];
} Products;

static inline void products_begin(Products *p) {
  for (int f = 0; f < 4; ++f) p->sums[f] = _mm_setzero_si128();
}

static inline void products_add(Products *p, const uint8_t *x, const int16_t *weights) {
  __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)x);
  __m128i low = _mm_unpacklo_epi8(bytes, _mm_setzero_si128());
  __m128i high = _mm_unpackhi_epi8(bytes, _mm_setzero_si128());
  for (int f = 0; f < 4; ++f) {
    const int16_t *w = weights + 16 * f;
    __m128i a = _mm_madd_epi16(low, _mm_loadu_si128((const __m128i *)(const void *)w));
    __m128i b = _mm_madd_epi16(high, _mm_loadu_si128((const __m128i *)(const void *)(w + 8)));
    p->sums[f] = _mm_add_epi32(p->sums[f], _mm_add_epi32(a, b));
  }
}

static inline void products_end(const Products *p, int32_t *sums) {
  for (int f = 0; f < 4; ++f) {
    __m128i four = _mm_add_epi32(p->sums[f], _mm_srli_si128(p->sums[f], 8));
    sums[f] = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_srli_si128(four, 4)));
  }
}
#elif defined(__ARM_NEON)
typedef struct {
  int32x4_t sums[4];
} Products;

static inline void products_begin(Products *p) {
  for (int f = 0; f < 4; ++f) p->sums[f] = vdupq_n_s32(0);
}

static inline void products_add(Products *p, const uint8_t *x, const int16_t *weights) {
  uint8x16_t bytes = vld1q_u8(x);
  int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
  int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(bytes)));
  for (int f = 0; f < 4; ++f) {
    int16x8_t a = vld1q_s16(weights + 16 * f);
    int16x8_t b = vld1q_s16(weights + 16 * f + 8);
    int32x4_t sum = vmlal_s16(p->sums[f], vget_low_s16(low), vget_low_s16(a));
    sum = vmlal_s16(sum, vget_high_s16(low), vget_high_s16(a));
    sum = vmlal_s16(sum, vget_low_s16(high), vget_low_s16(b));
    p->sums[f] = vmlal_s16(sum, vget_high_s16(high), vget_high_s16(b));
  }
}

static inline void products_end(const Products *p, int32_t *sums) {
  for (int f = 0; f < 4; ++f) sums[f] = vaddvq_s32(p->sums[f]);
}
#else
typedef struct {
  int32_t sums[4];
} Products;

static inline void products_begin(Products *p) { memset(p, 0, sizeof *p); }

static inline void products_add(Products *p, const uint8_t *x, const int16_t *weights) {
  for (int f = 0; f < 4; ++f) {
    for (int i = 0; i < 16; ++i) p->sums[f] += x[i] * weights[16 * f + i];
  }
}

static inline void products_end(const Products *p, int32_t *sums) {
  memcpy(sums, p->sums, sizeof p->sums);
}
#endif

static void multiply_vector(const Windows *windows, const uint8_t *x, const int16_t *weights,
                            int32_t *sums, const Requantization *each, const Residual *residuals,
                            const Output *output) {
  for (int32_t y = 0; y < windows->height; ++y) {
    for (int32_t u = 0; u < windows->width; ++u) {
      const uint8_t *corner = x + y * windows->row + u * windows->pixel;
      const int16_t *w = weights;
      for (int32_t f = 0; f < each->features; f += 4) {
        Products p;
        products_begin(&p);
        for (int32_t i = 0; i < windows->taps_down; ++i) {
          for (int32_t j = 0; j < windows->taps_across; ++j) {
            const uint8_t *from = corner + i * windows->tap_row + j * windows->tap_pixel;
            for (int32_t rest = windows->run; rest > 0; rest -= 16, from += 16, w += 64) {
              products_add(&p, from, w);
            }
          }
        }
        products_end(&p, sums + f);
      }
      finish(each, sums, residuals, y, u, windows->width, output);
    }
  }
}
