"""The first convolution, with the three zeros that the authors' program reads past the edge."""

from torch import Tensor, nn
from torch.nn import functional as F


class StemConv2d(nn.Conv2d):
    """A convolution whose last position may hang over the right and the bottom edge.

    The authors' program places 1 + ceil((side - kernel) / stride) kernels along a side, 55 for 224
    pixels, the last of which reads zeros beyond the image (layer.py of the 2012 source). So zeros
    are added on the right and at the bottom until the stride divides: three for 224, none for 227.
    """

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        kernel, stride = self.kernel_size[0], self.stride[0]
        zeros = (0, (kernel - width) % stride, 0, (kernel - height) % stride)
        return super().forward(F.pad(input, zeros) if any(zeros) else input)
