/* The same bytes in row-major order under another shape. */
typedef struct {
  int32_t height, width, channels, row, pixel;
} Layout;

static void reshape(const uint8_t *x, const Layout *from, uint8_t *y, const Layout *to) {
  int32_t v = 0, h = 0, c = 0;
  for (int32_t i = 0; i < from->height; ++i) {
    for (int32_t j = 0; j < from->width; ++j) {
      for (int32_t k = 0; k < from->channels; ++k) {
        y[v * to->row + h * to->pixel + c] = x[i * from->row + j * from->pixel + k];
        if (++c == to->channels) {
          c = 0;
          if (++h == to->width) {
            h = 0;
            ++v;
          }
        }
      }
    }
  }
}
