"""Loss and evaluation where each process has the logits of a shard of the classes.

Four numbers an image are sent, never the logits themselves.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_dist.parallel.collectives import all_gather
from alexnet_dist.parallel.sharding import ShardSpec

TOP_K = 5
"""Of the top-5 error."""


def cross_entropy(logits: Tensor, labels: Tensor, classes: ShardSpec) -> tuple[Tensor, Tensor]:
    """Summed loss of images with ``logits`` [b, own classes] and ``labels`` [b], and the class of
    each one's highest logit [b]."""
    loss, best = _CrossEntropy.apply(logits, labels, classes)
    return loss, best


class _CrossEntropy(torch.autograd.Function):
    """The gradient of a logit needs its own value and the sum over all classes, no other logit."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, classes: ShardSpec) -> Any:
        loss, _, best, total = _image_losses(logits, labels, classes)
        ctx.save_for_backward(logits, labels, total)
        ctx.classes = classes.slice
        ctx.mark_non_differentiable(best)
        return loss.sum(), best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits, labels, total = ctx.saved_tensors
        prob = (logits - total[:, None]).exp()
        own = torch.arange(ctx.classes.start, ctx.classes.stop, device=labels.device)
        one_hot = (own == labels[:, None]).to(prob.dtype)
        return (prob - one_hot) * grads[0], None, None


def eval_counts(logits: Tensor, labels: Tensor, classes: ShardSpec) -> Tensor:
    """float64 [4]: summed loss, images with their label as the highest logit, those with it among
    the five highest, and images.

    Of equal logits the lower class comes first, under any layout. Where any logit is NaN there is
    no order, and the label is not among the five.
    """
    loss, label_logits, _, _ = _image_losses(logits.double(), labels, classes)
    index = torch.arange(classes.slice.start, classes.slice.stop, device=labels.device)
    target, label = label_logits[:, None], labels[:, None]
    behind = (logits < target) | ((logits == target) & (index >= label))
    ranks = (~behind).sum(1) + TOP_K * logits.isnan().any(1)
    if classes.group is not None:
        dist.all_reduce(ranks, group=classes.group.group)
    top1, top5 = (ranks < 1).sum(), (ranks < TOP_K).sum()
    images = loss.new_tensor(len(labels))  # also where the loss is not finite
    return torch.stack([loss.sum(), top1.double(), top5.double(), images])


def _image_losses(
    logits: Tensor, labels: Tensor, classes: ShardSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each image [b]: loss, logit of its label, class of its highest logit, and logsumexp."""
    index = labels - classes.slice.start
    is_local = (index >= 0) & (index < len(classes))
    if len(classes):
        high, best = logits.max(1)
        target = logits.gather(1, index.clamp(0, len(classes) - 1)[:, None])[:, 0] * is_local
        sum_exp = (logits - high[:, None]).exp().sum(1)
        best = best + classes.slice.start
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
