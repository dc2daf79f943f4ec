"""An exact evaluation: every image counts once, on any number of processes."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_dist.errors import UserError
from alexnet_dist.training.step import LabeledImages, TrainableLayout


def evaluate(
    layout: TrainableLayout,
    batches: Iterable[LabeledImages],
    device: torch.device,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Errors over all batches of all processes, which may have different numbers of images.

    ``after_batch`` is called after each; what it raises ends the evaluation.
    """
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        counts += layout.eval_counts(batch.images, batch.labels)
        after_batch()
    return errors_of(counts)


def errors_of(counts: Tensor) -> dict[str, float]:
    """Errors in percent, mean loss, and images, over all processes; a collective call.

    Args:
        counts: this process's sum of ``layout.eval_counts``, float64 [4]: exact, without padding
            and means of means.
    """
    dist.all_reduce(counts)
    loss, top1, top5, count = counts.tolist()
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
