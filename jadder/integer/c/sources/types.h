#include <stdint.h>
#include <string.h>

/* An earlier activation that is added before rounding. */
typedef struct {
  const uint8_t *at;
  int32_t row, pixel; /* bytes from one to the next */
  int64_t multiplier;
} Residual;

/* From sums to the next activation. */
typedef struct {
  const int32_t *multiplier;
  const int64_t *bias;
  int32_t features, residuals, shift, low, high, center;
} Requantization;

/* Where results go: bytes into the arena, or the network's output. */
typedef struct {
  uint8_t *bytes;
  int32_t row, pixel; /* bytes from one to the next */
  int32_t *words;
} Output;
