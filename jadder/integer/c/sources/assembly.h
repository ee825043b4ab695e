/* A row of results by assembly. */
typedef void Row(const void *x, const uint32_t *weights, void *out, const uint8_t *residual);

typedef struct {
  int32_t height, row, out_row, residual_row;
} Rows;
