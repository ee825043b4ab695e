/* Fills the border of an activation, which lies row after row, with its zero point. */
static void border(uint8_t *buffer, int zero, int32_t height, int32_t row, int32_t before,
                   int32_t between, int32_t after) {
  memset(buffer, zero, (size_t)before);
  buffer += before + row - between;
  for (int32_t y = 1; y < height; ++y, buffer += row) memset(buffer, zero, (size_t)between);
  memset(buffer, zero, (size_t)after);
}
