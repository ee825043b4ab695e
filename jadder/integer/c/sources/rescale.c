/* Each activation by itself. */
static void rescale(int32_t height, int32_t width, const uint8_t *x, int32_t row, int32_t pixel,
                    int32_t *sums, const Requantization *each, const Residual *residuals,
                    const Output *output) {
  for (int32_t y = 0; y < height; ++y) {
    for (int32_t u = 0; u < width; ++u) {
      const uint8_t *from = x + y * row + u * pixel;
      for (int32_t c = 0; c < each->features; ++c) sums[c] = from[c];
      finish(each, sums, residuals, y, u, width, output);
    }
  }
}
