"""Shape of a vector register of a TPU, which cuts what kernels load and store."""

# 32-bit values of a row, whatever the generation; narrower ones are packed into rows.
NUM_LANES = 128
# Rows of 32-bit values.
SUBLANES = 8
