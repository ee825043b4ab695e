/* Copies an image into a buffer with a border or with more channels. */
static void copy_image(const uint8_t *image, int32_t height, int32_t width, int32_t channels,
                       uint8_t *buffer, int32_t row, int32_t pixel) {
  for (int32_t y = 0; y < height; ++y, buffer += row) {
    uint8_t *to = buffer;
    if (pixel == channels) {
      memcpy(to, image, (size_t)(width * channels));
      image += width * channels;
      continue;
    }
    for (int32_t x = 0; x < width; ++x, to += pixel) {
      for (int32_t c = 0; c < channels; ++c) to[c] = *image++;
    }
  }
}
