"""Loss and evaluation where each process has the logits of a shard of the classes.

Four numbers an image are sent, never the logits themselves.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_dist.parallel.collectives import TimedGroup, all_gather
from alexnet_dist.parallel.sharding import ShardSpec, gather_columns

TOP_K = 5
"""Of the top-5 error."""


class ShardedClasses:
    """The classes whose logits this process has, of ``num_classes``: its shard of them in
    ``group``, or all of them where that is None."""

    def __init__(self, num_classes: int, group: TimedGroup | None = None) -> None:
        self.group = group
        self.spec = ShardSpec(num_classes, *((group.size, group.rank) if group else (1, 0)))

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of images with ``logits`` [b, own classes] and ``labels`` [b], and the class
        of each one's highest logit [b]."""
        loss, best = _CrossEntropy.apply(logits, labels, self)
        return loss, best

    def eval_counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """float64 [4]: summed loss, images with their label as the highest logit, those with it
        among the five highest, and images.

        Of equal logits the lower class comes first, under any layout. Where any logit is NaN there
        is no order, and the label is not among the five.
        """
        loss, label_logits, _, _ = _sharded_cross_entropy(logits.double(), labels, self)
        index = torch.arange(self.spec.slice.start, self.spec.slice.stop, device=labels.device)
        target, label = label_logits[:, None], labels[:, None]
        behind = (logits < target) | ((logits == target) & (index >= label))
        ranks = (~behind).sum(1) + TOP_K * logits.isnan().any(1)
        if self.group is not None:
            dist.all_reduce(ranks, group=self.group.group)
        top1, top5 = (ranks < 1).sum(), (ranks < TOP_K).sum()
        images = loss.new_tensor(len(labels))  # also where the loss is not finite
        return torch.stack([loss.sum(), top1.double(), top5.double(), images])

    def gather_logits(self, logits: Tensor) -> Tensor:
        """The logits of all classes, [b, classes], of this process's [b, own classes]."""
        if self.group is None:
            return logits
        return gather_columns(logits, self.spec, self.group)


def _sharded_cross_entropy(
    logits: Tensor, labels: Tensor, classes: ShardedClasses
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each image [b]: loss, logit of its label, class of its highest logit, and logsumexp."""
    spec = classes.spec
    index = labels - spec.slice.start
    is_local = (index >= 0) & (index < len(spec))
    if len(spec):
        high, best = logits.max(1)
        target = logits.gather(1, index.clamp(0, len(spec) - 1)[:, None])[:, 0] * is_local
        sum_exp = (logits - high[:, None]).exp().sum(1)
        best = best + spec.slice.start
    else:  # more processes than classes
        high = logits.new_full(labels.shape, -torch.inf)
        best, target, sum_exp = labels * 0, logits.new_zeros(labels.shape), high.exp()
    if classes.group is not None:
        local = torch.stack([high, best.to(logits.dtype), target, sum_exp])
        highs, bests, targets, sums = all_gather(local, classes.group).unbind(1)
        high, holder = highs.max(0)
        best = bests.gather(0, holder[None])[0].long()
        target = targets.sum(0)
        sum_exp = (sums * (highs - high).exp()).sum(0)
    total = high + sum_exp.log()
    return total - target, target, best, total


class _CrossEntropy(torch.autograd.Function):
    """The gradient of a logit needs its own value and the sum over all classes, no other logit."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, classes: ShardedClasses) -> Any:
        loss, _, best, total = _sharded_cross_entropy(logits, labels, classes)
        ctx.save_for_backward(logits, labels, total)
        ctx.spec = classes.spec
        ctx.mark_non_differentiable(best)
        return loss.sum(), best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits, labels, total = ctx.saved_tensors
        prob = (logits - total[:, None]).exp()
        own = torch.arange(ctx.spec.slice.start, ctx.spec.slice.stop, device=labels.device)
        one_hot = (own == labels[:, None]).to(prob.dtype)
        return (prob - one_hot) * grads[0], None, None
