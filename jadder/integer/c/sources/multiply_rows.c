/* All rows of a multiplying layer. */
static void multiply_rows(Row *one, const Rows *rows, const Wide *wide, const uint8_t *x,
                          int16_t *scratch, const uint32_t *weights, uint8_t *out,
                          const uint8_t *residual) {
  for (int32_t y = 0; y < rows->height; ++y) {
    widen(wide, x, scratch);
    one(scratch, weights, out, residual);
    x += rows->row;
    out += rows->out_row;
    residual += rows->residual_row;
  }
}
