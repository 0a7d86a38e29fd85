"""What the tests of attention_int8 on CPU and GPU share."""

import torch

#: Against float64 without any quantisation, for standard normal inputs.
QUANTIZED = 0.02


#: Against the float64 continuation of the same integers. A sum of the mean that rounds differently
#: moves no code; only float32 softmax and sums are left.
SAME_CODES = {torch.float32: 4e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
