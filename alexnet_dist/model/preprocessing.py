"""From images as they are stored to scores, in one network: what an exported graph may hold."""

import torch
from torch import Tensor, nn


class Preprocessed(nn.Module):
    """A network behind an evaluation's crop, resize and normalisation.

    Input: uint8 [B, H, W, 3], RGB, of any height and width; output: scores [B, classes].

    An antialiased bilinear resize is a linear map of columns after one of rows, so crop and resize
    are two products with matrices that are made from H and W: operations that every runtime has,
    and has alike. Where the central view is ``side`` pixels wide already (an image whose shorter
    side is as stored for training), they are ones and zeros, and nothing is rounded. Elsewhere
    values of 0..255 may differ by 1 from torchvision's, which rounds between the two maps.

    Args:
        mean, std: [3], of pixels of 0..255.
        side: that of the images that ``network`` reads.
        fraction: side of the view over the shorter side of the image.
    """

    mean: Tensor
    factor: Tensor

    def __init__(
        self, network: nn.Module, mean: Tensor, std: Tensor, *, side: int, fraction: float
    ) -> None:
        super().__init__()
        self.network, self.side, self.fraction = network, side, fraction
        self.register_buffer("mean", mean.float()[:, None, None])
        self.register_buffer("factor", (1 / std.float())[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[1:3]
        shorter = torch.minimum(_number(height), _number(width))
        box = (shorter * self.fraction).round().clamp(min=1)
        rows, columns = self._map(height, box), self._map(width, box)
        pixels = rows @ images.permute(0, 3, 1, 2).float() @ columns.T
        pixels = pixels.round().clamp(0, 255)
        scores: Tensor = self.network((pixels - self.mean) * self.factor)
        return scores

    def _map(self, length: int, box: Tensor) -> Tensor:
        """[side, length]: what each of the pixels along a side is made of, of ``length`` of which
        the ``box`` in the middle is taken."""
        first = torch.floor((_number(length) - box) / 2)
        scale = box / self.side
        middle = first + (torch.arange(self.side, dtype=torch.float64) + 0.5) * scale
        place = torch.arange(length, dtype=torch.float64)
        away = (place + 0.5 - middle[:, None]).abs() / scale.clamp(min=1)
        inside = (place >= first) & (place < first + box)
        weights = (1 - away).clamp(min=0) * inside
        return (weights / weights.sum(1, keepdim=True)).float()


def _number(length: int) -> Tensor:
    """A side as a tensor, which in an exported graph is unknown."""
    return torch.full((), length, dtype=torch.float64)
