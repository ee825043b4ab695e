/* All rows of an adder layer whose results C makes of its sums. */
static void adder_rows_of_sums(Row *one, const Rows *rows, const uint8_t *x,
                               const uint32_t *weights, int32_t *sums, int32_t width,
                               const Requantization *each, const Residual *residuals,
                               const Output *output) {
  int32_t features = (each->features + 3) & ~3;
  for (int32_t y = 0; y < rows->height; ++y, x += rows->row) {
    one(x, weights, sums, 0);
    for (int32_t u = 0; u < width; ++u) {
      finish(each, sums + u * features, residuals, y, u, width, output);
    }
  }
}
