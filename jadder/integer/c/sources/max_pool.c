/* The largest of each window; what lies outside of the input takes no part. */
static void max_pool(const Windows *windows, const uint8_t *x, int32_t in_height,
                     int32_t in_width, int32_t stride_down, int32_t stride_across, int32_t top,
                     int32_t left, const Output *output) {
  for (int32_t y = 0; y < windows->height; ++y) {
    for (int32_t u = 0; u < windows->width; ++u) {
      uint8_t *to = output->bytes + y * output->row + u * output->pixel;
      memset(to, 0, (size_t)windows->run);
      for (int32_t i = 0; i < windows->taps_down; ++i) {
        int32_t v = y * stride_down + i - top;
        for (int32_t j = 0; j < windows->taps_across; ++j) {
          int32_t h = u * stride_across + j - left;
          if (v < 0 || v >= in_height || h < 0 || h >= in_width) continue;
          const uint8_t *from = x + v * windows->tap_row + h * windows->tap_pixel;
          for (int32_t c = 0; c < windows->run; ++c) {
            if (from[c] > to[c]) to[c] = from[c];
          }
        }
      }
    }
  }
}
