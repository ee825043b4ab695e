/* Sums of products: of one window and all filters, and of all windows. Filters follow one another. */
static void multiply_sums(const Windows *windows, const uint8_t *x, const int8_t *weights,
                          int32_t *sums) {
  for (int32_t g = 0; g < windows->groups; ++g, x += windows->group_step) {
    for (int32_t f = 0; f < windows->group_features; ++f) {
      int32_t sum = 0;
      for (int32_t i = 0; i < windows->taps_down; ++i) {
        for (int32_t j = 0; j < windows->taps_across; ++j, weights += windows->run) {
          const uint8_t *from = x + i * windows->tap_row + j * windows->tap_pixel;
          for (int32_t k = 0; k < windows->run; ++k) {
            sum += from[k] * weights[k];
          }
        }
      }
      *sums++ = sum;
    }
  }
}

static void multiply(const Windows *windows, const uint8_t *x, const int8_t *weights, int32_t *sums,
                     const Requantization *each, const Residual *residuals, const Output *output) {
  for (int32_t y = 0; y < windows->height; ++y) {
    for (int32_t u = 0; u < windows->width; ++u) {
      multiply_sums(windows, x + y * windows->row + u * windows->pixel, weights, sums);
      finish(each, sums, residuals, y, u, windows->width, output);
    }
  }
}
