/* The windows of a convolution or pool: bytes from one row, column or tap to the next. */
typedef struct {
  int32_t height, width; /* of the result */
  int32_t row, pixel;
  int32_t taps_down, taps_across, tap_row, tap_pixel;
  int32_t run; /* neighbouring bytes that one tap takes */
  int32_t groups, group_features, group_step;
} Windows;
