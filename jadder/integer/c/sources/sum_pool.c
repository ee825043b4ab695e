/* Sums of one channel over windows. */
static void sum_pool(const Windows *windows, const uint8_t *x, int32_t *sums,
                     const Requantization *each, const Residual *residuals,
                     const Output *output) {
  for (int32_t y = 0; y < windows->height; ++y) {
    for (int32_t u = 0; u < windows->width; ++u) {
      const uint8_t *corner = x + y * windows->row + u * windows->pixel;
      for (int32_t c = 0; c < windows->run; ++c) sums[c] = 0;
      for (int32_t i = 0; i < windows->taps_down; ++i) {
        const uint8_t *from = corner + i * windows->tap_row;
        for (int32_t j = 0; j < windows->taps_across; ++j, from += windows->tap_pixel) {
          for (int32_t c = 0; c < windows->run; ++c) sums[c] += from[c];
        }
      }
      finish(each, sums, residuals, y, u, windows->width, output);
    }
  }
}
