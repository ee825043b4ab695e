/* Fills a whole activation with zero points, one for each channel. */
static void fill_channels(uint8_t *buffer, const uint8_t *zeros, int32_t channels,
                          int32_t pixels) {
  for (int32_t i = 0; i < pixels; ++i, buffer += channels) {
    memcpy(buffer, zeros, (size_t)channels);
  }
}
