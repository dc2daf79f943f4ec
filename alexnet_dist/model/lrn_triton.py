# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
"""Local response normalization on NVIDIA GPUs: each direction reads and writes memory once.

    forward     y = x * s ** -0.75            s = k + scale * sum of x ** 2 over five channels
    backward    grad * s ** -0.75 - 1.5 * scale * x * sum of (grad * x * s ** -1.75) over five

Forward moves 4 bytes an activation in 16 bits, backward 6; only x is kept between them. To stay
within the instructions that an H100 can issue meanwhile (about 40 an activation forward, 60
backward), a thread holds eight neighboring channels of a pixel, one load of 16 bytes, sums them in
registers, and loads the two or four beyond either side again, from the cache: 17 instructions
forward and 35 backward in bf16, no shared memory. Channels-last memory is a row of such eights,
whatever pixels, groups and images they belong to: an eight must only know whether its group ends
beside it.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

BLOCK = 128  # in a program: one to a thread
WARPS = 4


@triton.jit
def _two(x):
    """The columns of [n, 2]."""
    a, b = tl.split(x)
    return (a, b)


@triton.jit
def _four(x):
    """The columns of [n, 4], in order."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    a, b = _two(even), _two(odd)
    return (a[0], b[0], a[1], b[1])


@triton.jit
def _eight(x):
    """The columns of [n, 8], in order."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 4, 2)))
    a, b = _four(even), _four(odd)
    return (a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3])


@triton.jit
def _join(y):
    """[n, 8] of eight columns."""
    even = tl.join(tl.join(y[0], y[4]), tl.join(y[2], y[6]))
    odd = tl.join(tl.join(y[1], y[5]), tl.join(y[3], y[7]))
    return tl.reshape(tl.join(even, odd), (y[0].shape[0], 8))


@triton.jit
def _load(start, first, width: tl.constexpr, there):
    """float32 [n, width]: those from ``first`` on, zeros where they are not ``there``."""
    at = first[:, None] + tl.arange(0, width)[None, :]
    return tl.load(start + at, there[:, None], other=0.0).to(tl.float32)


@triton.jit
def _load_around(start, first, there, left, right, reach: tl.constexpr):
    """Eights and the ``reach`` (2 or 4) channels on either side, as columns."""
    before = _load(start, first - reach, reach, left)
    after = _load(start, first + 8, reach, right)
    if start.dtype.element_ty == tl.float32:  # 16 bytes are four: eight would lie in two threads
        own = _four(_load(start, first, 4, there)) + _four(_load(start, first + 4, 4, there))
    else:
        own = _eight(_load(start, first, 8, there))
    if reach == 2:
        return _two(before) + own + _two(after)
    else:
        return _four(before) + own + _four(after)


@triton.jit
def _offsets(count, per_group: tl.constexpr, eights: tl.constexpr):
    """Of this program's eights: the first one, their beginnings from there, and whether they, and
    neighbors on the left and on the right of the same group, are there."""
    program = tl.program_id(0)
    local = tl.arange(0, eights)
    eight = program * eights + local
    there = eight < count
    place = eight % per_group
    left, right = there & (place > 0), there & (place < per_group - 1)
    return program.to(tl.int64) * (eights * 8), local * 8, there, left, right


@triton.jit
def _sum_of_five(values, at: tl.constexpr):
    return values[at] + values[at + 1] + values[at + 2] + values[at + 3] + values[at + 4]


@triton.jit
def _forward(x_pointer, y_pointer, count, k, scale, per_group: tl.constexpr, eights: tl.constexpr):
    start, first, there, left, right = _offsets(count, per_group, eights)
    x = _load_around(x_pointer + start, first, there, left, right, 2)
    squares = ()
    for i in tl.static_range(12):
        squares += (x[i] * x[i],)
    y = ()
    for i in tl.static_range(8):
        root = tl.rsqrt(k + scale * _sum_of_five(squares, i))
        y += (x[i + 2] * (root * tl.sqrt(root)),)
    at = first[:, None] + tl.arange(0, 8)[None, :]
    tl.store(y_pointer + start + at, _join(y).to(y_pointer.dtype.element_ty), mask=there[:, None])


@triton.jit
def _backward(
    x_pointer,
    grad_pointer,
    out_pointer,
    count,
    k,
    scale,
    per_group: tl.constexpr,
    eights: tl.constexpr,
):
    start, first, there, left, right = _offsets(count, per_group, eights)
    x = _load_around(x_pointer + start, first, there, left, right, 4)
    grad = _load_around(grad_pointer + start, first, there, left, right, 2)
    squares = ()
    for i in tl.static_range(16):
        squares += (x[i] * x[i],)
    direct = ()  # grad * s ** -0.75, of two neighbors on either side too
    terms = ()
    for i in tl.static_range(12):
        root = tl.rsqrt(k + scale * _sum_of_five(squares, i))
        scaled = grad[i] * (root * tl.sqrt(root))
        direct += (scaled,)
        terms += (scaled * x[i + 2] * (root * root),)
    out = ()
    for i in tl.static_range(8):
        out += (direct[i + 2] - 1.5 * scale * x[i + 4] * _sum_of_five(terms, i),)
    at = first[:, None] + tl.arange(0, 8)[None, :]
    tl.store(
        out_pointer + start + at, _join(out).to(out_pointer.dtype.element_ty), mask=there[:, None]
    )


def is_supported(x: Tensor, groups: int) -> bool:
    """Whether the kernels can normalize ``x``: channels-last, with groups of whole eights."""
    return (
        x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.dim() == 4
        and x.shape[1] % (8 * groups) == 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


@torch.library.custom_op("alexnet_dist::lrn", mutates_args=())
def lrn(x: Tensor, k: float, scale: float, groups: int) -> Tensor:
    """y = x * (k + scale * sum of x ** 2 over five channels of a group) ** -0.75.

    Input and output: [B, C, H, W], which ``is_supported``, of one dtype; computed in float32.
    """
    return _launch(_forward, (x,), k, scale, groups)


@torch.library.custom_op("alexnet_dist::lrn_backward", mutates_args=())
def lrn_backward(x: Tensor, grad: Tensor, k: float, scale: float, groups: int) -> Tensor:
    """The gradient of ``lrn`` for ``x``, from that for its output."""
    grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return _launch(_backward, (x, grad), k, scale, groups)


def _launch(kernel: Any, inputs: tuple[Tensor, ...], k: float, scale: float, groups: int) -> Tensor:
    out = torch.empty_like(inputs[0])
    count, per_group = out.numel() // 8, out.shape[1] // groups // 8
    if count:
        grid = (triton.cdiv(count, BLOCK),)
        kernel[grid](*inputs, out, count, k, scale, per_group, BLOCK, num_warps=WARPS)
    return out


def _empty_like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float, float, int], output: Tensor) -> None:
    x, *ctx.constants = inputs
    ctx.save_for_backward(x)


def _backward_op(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (x,) = ctx.saved_tensors
    return lrn_backward(x, grad, *ctx.constants), None, None, None


lrn.register_fake(_empty_like)
lrn_backward.register_fake(_empty_like)
lrn.register_autograd(_backward_op, setup_context=_setup_context)
