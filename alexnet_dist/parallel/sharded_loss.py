"""Loss and hits where each process has the scores of some of the classes only.

What travels is four numbers an image, never the scores themselves.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from alexnet_dist.parallel.collectives import all_gather, upcast_to_fp32
from alexnet_dist.parallel.sharding import ShardSpec

TOP_K = 5
"""Labels that an image may be given where the top-5 error is counted."""


@dataclass(frozen=True)
class ShardedClasses:
    """The classes whose scores this process has, and the group that has the others."""

    share: ShardSpec
    group: dist.ProcessGroup | None = None

    def cross_entropy(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of images with ``scores`` [b, own classes] and ``labels`` [b], and each
        one's best class [b]."""
        scores = upcast_to_fp32(scores)
        if self.group is None:
            return F.cross_entropy(scores, labels, reduction="sum"), scores.argmax(1)
        loss, best = _CrossEntropy.apply(scores, labels, self)
        return loss, best

    def label_ranks(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss, float64, and the place of each label among all scores [b], 0 the best.

        Of equal scores the lower class comes first, under any layout. Where any score is not a
        number there is no order, and the label's place is behind the best five.
        """
        loss, target, _, _ = _sharded_cross_entropy(scores.double(), labels, self)
        number = torch.arange(self.share.slice.start, self.share.slice.stop, device=labels.device)
        exact, own = target[:, None], labels[:, None]
        lower = (scores < exact) | ((scores == exact) & (number >= own))
        places = (~lower).sum(1) + TOP_K * scores.isnan().any(1)
        if self.group is not None:
            dist.all_reduce(places, group=self.group)
        return loss.sum(), places

    def gather_logits(self, scores: Tensor) -> Tensor:
        """The scores of all classes, [b, classes]."""
        if self.group is None:
            return scores
        padded = scores.new_zeros(len(scores), self.share.max_shard_size)
        padded[:, : scores.shape[1]] = scores
        everyone = all_gather(padded, self.group)
        return everyone.transpose(0, 1).flatten(1)[:, : self.share.full_size]


def to_counts(loss: Tensor, places: Tensor) -> Tensor:
    """What a layout's ``hits`` gives, of the summed loss and the places of the labels."""
    first, five = (places < 1).sum(), (places < TOP_K).sum()
    images = torch.full_like(loss, len(places))  # whatever the loss is
    return torch.stack([loss, first.double(), five.double(), images])


def _sharded_cross_entropy(
    scores: Tensor, labels: Tensor, classes: ShardedClasses
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each image: loss, score of its label, best class, and logarithm of the summed exp."""
    share = classes.share
    number = labels - share.slice.start
    mine = (number >= 0) & (number < len(share))
    if len(share):
        high, best = scores.max(1)
        target = scores.gather(1, number.clamp(0, len(share) - 1)[:, None])[:, 0] * mine
        spread = (scores - high[:, None]).exp().sum(1)
        best = best + share.slice.start
    else:  # more processes than classes
        high = scores.new_full(labels.shape, -torch.inf)
        best, target, spread = labels * 0, scores.new_zeros(labels.shape), high.exp()
    if classes.group is not None:
        mine_of_four = torch.stack([high, best.to(scores.dtype), target, spread])
        highs, bests, targets, spreads = all_gather(mine_of_four, classes.group).unbind(1)
        high, holder = highs.max(0)
        best = bests.gather(0, holder[None])[0].long()
        target = targets.sum(0)
        spread = (spreads * (highs - high).exp()).sum(0)
    total = high + spread.log()
    return total - target, target, best, total


class _CrossEntropy(torch.autograd.Function):
    """The gradient of a score needs its own value and the sum over all classes, no other score."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor, classes: ShardedClasses) -> Any:
        loss, _, best, total = _sharded_cross_entropy(scores, labels, classes)
        ctx.save_for_backward(scores, labels, total)
        ctx.share = classes.share
        ctx.mark_non_differentiable(best)
        return loss.sum(), best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scores, labels, total = ctx.saved_tensors
        chance = (scores - total[:, None]).exp()
        span = ctx.share.slice
        label = torch.arange(span.start, span.stop, device=labels.device) == labels[:, None]
        return (chance - label.to(chance.dtype)) * grads[0], None, None
