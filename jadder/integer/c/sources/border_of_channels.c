/* Fills pixels with zero points, one for each channel. */
static uint8_t *fill_channels(uint8_t *to, const uint8_t *zeros, int32_t channels, int32_t bytes) {
  for (; bytes > 0; bytes -= channels) {
    for (int32_t c = 0; c < channels; ++c) *to++ = zeros[c];
  }
  return to;
}

/* Fills the border of an activation, which lies row after row. */
static void border_of_channels(uint8_t *buffer, const uint8_t *zeros, int32_t channels,
                               int32_t height, int32_t row, int32_t before, int32_t between,
                               int32_t after) {
  buffer = fill_channels(buffer, zeros, channels, before) + row - between;
  for (int32_t y = 1; y < height; ++y) {
    buffer = fill_channels(buffer, zeros, channels, between) + row - between;
  }
  fill_channels(buffer, zeros, channels, after);
}
