"""Check an int8 linear layer on a CPU without AVX-512, which qemu emulates."""

import torch
from torch import nn

from predictor.kernels.cpu import linear

assert not torch.cpu.get_capabilities()["avx512_vnni"]
torch.manual_seed(0)
plain = nn.Linear(512, 256)
plain.weight.data[0], plain.bias.data[0] = 1, 0  # weights and inputs at the end of their range must not saturate
activations = torch.cat((torch.ones(1, 512), torch.randn(8, 512)))
kernel = linear.fuse_linears([plain], quantize=True)
assert kernel is not None
expected, outputs = plain(activations), kernel(activations)
torch.testing.assert_close(outputs[0, 0].item(), 512.0)
assert (outputs - expected).norm() < 0.02 * expected.norm()
