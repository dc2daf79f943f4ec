"""Data parallel: each process holds the whole network and computes its rows of the batch."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from alexnet_dist.parallel.mesh import Mesh, Precision

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DataParallel:
    """What the loop calls when every replica holds the network.

    Attributes:
        parameters: by name, ordinary local tensors.
        scaler: scales the loss in fp16, and lets all else pass.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        batch: int,
        precision: Precision = "fp32",
        compile_model: bool = False,
    ) -> None:
        self.mesh, self.batch, self.precision = mesh, batch, precision
        self.model = model.to(mesh.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.scaler = GradScaler(mesh.device.type, enabled=precision == "fp16")
        self._compute = torch.compile(self.model) if compile_model else self.model
        if mesh.replicas > 1:
            # views, because a second copy of 61 million gradients costs a pass over memory; the
            # two large layers fill a bucket each, whose sums run under the convolutions' backward
            self._compute = DistributedDataParallel(
                self._compute,
                device_ids=[mesh.device] if mesh.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                bucket_cap_mb=32,
            )

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = _AUTOCAST.get(self.precision)
        return torch.autocast(self.mesh.device.type, dtype, enabled=dtype is not None)

    def forward_backward(
        self, images: Tensor, labels: Tensor, masks: Iterable[Tensor] = ()
    ) -> Tensor:
        """Gradients of the global batch's mean loss, from this replica's rows of it.

        Returns:
            float64 [2], on the device: the summed (not mean) loss of this replica's images, and
            how many of them have the best label right. Both sum over the replicas, and the sums
            do not depend on their order: float32 values, added in float64.
        """
        self.model.train()
        with self._autocast():
            logits = self._compute(images, tuple(masks))
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        # DDP takes the mean over replicas, which may have different numbers of images
        self.scaler.scale(total * (self.mesh.replicas / self.batch)).backward()
        with torch.no_grad():
            right = (logits.argmax(1) == labels).sum()
            return torch.stack([total.detach().double(), right.double()])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """float32 [b, classes], as evaluation computes them."""
        self.model.eval()
        with self._autocast():
            return self.model(images).float()

    def hits(self, images: Tensor, labels: Tensor) -> Tensor:
        """float64 [3], on the device: summed loss, images whose best label is right, and those
        with the right one among the best five (of fewer classes: all)."""
        if len(images) == 0:
            return torch.zeros(3, dtype=torch.float64, device=labels.device)
        logits = self.logits(images)
        best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        loss = F.cross_entropy(logits.double(), labels, reduction="sum")
        return torch.stack([loss, best[:, 0].sum().double(), best.sum().double()])

    def warm_up(self, images: Tensor, labels: Tensor, masks: Iterable[Tensor]) -> None:
        """Two backward passes that change nothing.

        After its first backward DDP sorts its buckets anew, by the order in which gradients came;
        from then on sums run in another order. A resumed run that began with that first pass
        would differ from an uninterrupted one in the last bits.
        """
        masks = tuple(masks)
        for _ in range(2):
            self.forward_backward(images, labels, masks)
        for parameter in self.parameters.values():
            parameter.grad = None
