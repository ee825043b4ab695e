/* The rows of a window as 16-bit integers, in blocks of 16. */
typedef void Widen(const uint8_t *from, int16_t *to, int32_t blocks);

typedef struct {
  Widen *one;
  int32_t taps_down, tap_row, blocks;
} Wide;

static void widen(const Wide *wide, const uint8_t *x, int16_t *to) {
  for (int32_t i = 0; i < wide->taps_down; ++i) {
    wide->one(x, to, wide->blocks);
    x += wide->tap_row;
    to += 16 * wide->blocks;
  }
}
