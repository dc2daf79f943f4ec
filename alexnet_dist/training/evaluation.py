"""An exact evaluation: every image counts once, on any number of processes."""

import torch
from torch import Tensor
from torchmetrics import Metric

from alexnet_dist.errors import UserError


class EvalMetrics(Metric):
    """Loss and errors over a data set, counted exactly: sums of ``layout.eval_counts``, float64
    [4]; no padding, no mean of means."""

    full_state_update = False
    counts: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        self.add_state("counts", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.to(device)

    def update(self, counts: Tensor) -> None:
        self.counts += counts

    def compute(self) -> dict[str, float]:
        """Errors in percent, mean loss, and images, over all processes; a collective call."""
        loss, top1, top5, count = self.counts.tolist()
        images = int(count)
        return {
            "top1_error": 100.0 * (images - int(top1)) / max(images, 1),
            "top5_error": 100.0 * (images - int(top5)) / max(images, 1),
            "loss": loss / max(images, 1),
            "images": images,
        }


def count_skipped(result: dict[str, float], skipped: int, images: int) -> dict[str, float]:
    """The result of an evaluation, with ``skipped`` if there are any; raises a UserError unless
    every image was counted once."""
    if result["images"] + skipped != images:
        raise UserError(
            f"evaluation counted {result['images']} images and skipped {skipped}, but there "
            f"are {images}: this is a defect, please report it",
            on_all_ranks=True,
        )
    return result | ({"num_skipped": skipped} if skipped else {})
