"""torchvision's AlexNet, as the other networks are called."""

from collections import OrderedDict
from collections.abc import Iterable

import torchvision
from torch import Tensor, nn

from alexnet_dist.model.alexnet import AlexNet, StemConv2d, forward_layers
from alexnet_dist.model.dropout import Dropout, DropoutScaling
from alexnet_dist.model.layers import AdaptiveAvgPool


class TorchvisionAlexNet(torchvision.models.AlexNet):
    """torchvision's own class and parameters, which takes masks as AlexNet does."""

    arch: str
    features: nn.Sequential

    def __init__(self, num_classes: int, dropout: float, scaling: DropoutScaling) -> None:
        super().__init__(num_classes=num_classes, dropout=dropout)
        self.avgpool = AdaptiveAvgPool(6)
        self.features[0] = StemConv2d(3, 64, 11, 4, 2, ceil_mode=False)
        self.classifier[0] = Dropout(256 * 6 * 6, dropout, scaling)
        self.classifier[3] = Dropout(4096, dropout, scaling)

    def forward(self, x: Tensor, masks: Iterable[Tensor] = ()) -> Tensor:
        x = self.avgpool(forward_layers(self.features, x, ())).flatten(1)
        return forward_layers(self.classifier, x, masks)

    def split_features_classifier(self) -> tuple[nn.Sequential, dict[str, nn.Module]]:
        """The convolutions, [B, 3, H, W] to [B, features], and the layers behind them by name."""
        layers = dict(self.features.named_children())
        layers |= {"avgpool": self.avgpool, "flatten": nn.Flatten()}
        named = {f"classifier.{name}": layer for name, layer in self.classifier.named_children()}
        return AlexNet(OrderedDict(layers)), named
