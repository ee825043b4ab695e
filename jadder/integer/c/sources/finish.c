/* value >> shift, towards minus infinity whatever the compiler does with negative numbers. */
static int64_t shifted(int64_t value, int32_t shift) {
  return value < 0 ? ~(~value >> shift) : value >> shift;
}

/* Takes the mean over the features away: F * S - sum of all S. */
static void center(int32_t *sums, int32_t features) {
  int64_t total = 0;
  for (int32_t f = 0; f < features; ++f) total += sums[f];
  for (int32_t f = 0; f < features; ++f) {
    sums[f] = (int32_t)((int64_t)features * sums[f] - total);
  }
}

/* The results of one position (y, x) from its sums. */
static void finish(const Requantization *each, int32_t *sums, const Residual *residuals, int32_t y,
                   int32_t x, int32_t width, const Output *output) {
  if (each->center) center(sums, each->features);
  for (int32_t f = 0; f < each->features; ++f) {
    int64_t value = (int64_t)sums[f] * each->multiplier[f] + each->bias[f];
    for (int32_t r = 0; r < each->residuals; ++r) {
      const Residual *one = &residuals[r];
      value += one->at[y * one->row + x * one->pixel + f] * one->multiplier;
    }
    value = shifted(value, each->shift);
    if (value < each->low) value = each->low;
    if (value > each->high) value = each->high;
    if (output->words) {
      output->words[(y * width + x) * each->features + f] = (int32_t)value;
    } else {
      output->bytes[y * output->row + x * output->pixel + f] = (uint8_t)value;
    }
  }
}
