/* All rows of an adder layer. */
static void adder_rows(Row *one, const Rows *rows, const uint8_t *x, const uint32_t *weights,
                       uint8_t *out, const uint8_t *residual) {
  for (int32_t y = 0; y < rows->height; ++y) {
    one(x, weights, out, residual);
    x += rows->row;
    out += rows->out_row;
    residual += rows->residual_row;
  }
}
