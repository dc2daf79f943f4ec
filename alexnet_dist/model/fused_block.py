# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
"""What follows a convolution of 2012, on NVIDIA GPUs: bias, ReLU, local response normalization and
3 x 3 max pooling at stride 2, in one kernel forward and one backward.

    relu_first (the paper)         a = relu(z + bias)   y = a * s ** -0.75   pooled = max y
    otherwise (the authors' own)   a = z + bias         y = a * s ** -0.75   pooled = relu(max y)

with s = k + scale * sum of a ** 2 over five channels. As separate passes these are most of what a
training step reads and writes. Here forward reads z and writes the pooled map and a byte for each
of its values, which tells where in its window the maximum was; backward reads z, the gradient and
the bytes, and writes the gradient of z: 2.75 and 4.75 bytes for each value of z in 16 bits.

A thread has eight neighboring channels, 16 bytes, and goes along a row of windows (backward: of
pixels). What two neighboring windows share it computes once and carries along. The channels on
either side it loads again, from the cache, unless its group ends there. No shared memory in these
loops, and no atomic addition: results have the same bits each time.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

THREADS = 128  # of a program
NOWHERE = tl.constexpr(9)  # in place of 0 to 8: relu has cut the maximum off


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
def _load(pointer, first, width: tl.constexpr, there):
    """float32 [n, width]: those from ``first`` on, zeros where they are not ``there``."""
    at = first[:, None] + tl.arange(0, width)[None, :]
    return tl.load(pointer + at, there[:, None], other=0).to(tl.float32)


@triton.jit
def _thread(count, rows, channels: tl.constexpr, per_group: tl.constexpr, threads: tl.constexpr):
    """Image, row and first channel of each thread; whether it has work, and whether its group goes
    on to the left and to the right."""
    index = tl.program_id(0) * threads + tl.arange(0, threads)
    eight, line = index % (channels // 8), index // (channels // 8)
    left, right = eight % per_group > 0, eight % per_group < per_group - 1
    return line // rows, line % rows, eight * 8, (index < count, left, right)


@triton.jit
def _around(pointer, first, there, reach: tl.constexpr):
    """Eight channels and the ``reach`` on either side, as columns; zeros beyond the group."""
    here, left, right = there
    before = _load(pointer, first - reach, reach, here & left)
    own = _eight(_load(pointer, first, 8, here))
    after = _load(pointer, first + 8, reach, here & right)
    if reach == 2:
        return _two(before) + own + _two(after)
    else:
        return _four(before) + own + _four(after)


@triton.jit
def _activations(pointer, first, there, bias, relu: tl.constexpr, reach: tl.constexpr):
    """a, and the sums of five of their squares, as columns."""
    z = _around(pointer, first, there, reach)
    a, squares, sums = (), (), ()
    for i in tl.static_range(8 + 2 * reach):
        value = z[i] + bias[i]
        value = tl.where(value < 0, 0.0, value) if relu else value  # NaN stays
        a += (value,)
        squares += (value * value,)
    for i in tl.static_range(4 + 2 * reach):
        sums += (squares[i] + squares[i + 1] + squares[i + 2] + squares[i + 3] + squares[i + 4],)
    return a, sums


@triton.jit
def _maximum(best, code, other, other_code):
    """The larger of two with its code; of equal ones the first in its window, as in torch; NaN is
    larger than all."""
    larger = (other > best) | (other != other) | ((other == best) & (other_code < code))
    return tl.where(larger, other, best), tl.where(larger, other_code, code)


@triton.jit
def _window_column(
    pointer, first, there, row, column, height, width, bias, k, scale, channels: tl.constexpr,
    relu: tl.constexpr,
):  # fmt: skip
    """The greatest y among three pixels below each other, [n, 8], and its code."""
    best = tl.full((first.shape[0], 8), float("-inf"), tl.float32)
    code = tl.zeros((first.shape[0], 8), tl.int32)
    for i in tl.static_range(3):
        here = there[0] & (row + i < height) & (column < width)
        at = ((row + i) * width + column) * channels + first
        a, sums = _activations(pointer, at, (here, there[1], there[2]), bias, relu, 2)
        y = ()
        for c in tl.static_range(8):
            root = tl.rsqrt(k + scale * sums[c])
            y += (a[c + 2] * (root * tl.sqrt(root)),)
        values = tl.where(here[:, None], _join(y), float("-inf"))
        best, code = _maximum(best, code, values, tl.full(code.shape, 3 * i, tl.int32))
    return best, code


@triton.jit
def _forward(
    z_pointer, bias_pointer, out_pointer, code_pointer, count, k, scale, height, out_height,
    width: tl.constexpr, out_width: tl.constexpr, channels: tl.constexpr, per_group: tl.constexpr,
    relu_first: tl.constexpr, threads: tl.constexpr,
):  # fmt: skip
    """A thread has a row of windows of an image."""
    image, row, first, there = _thread(count, out_height, channels, per_group, threads)
    z = z_pointer + (image.to(tl.int64) * (height * width) * channels)[:, None]
    bias = _around(bias_pointer, first, there, 2)
    out = (image * out_height + row).to(tl.int64) * out_width * channels + first
    last, last_code = _window_column(
        z, first, there, 2 * row, 0, height, width, bias, k, scale, channels, relu_first
    )
    for window in range(out_width):
        best, code = last, last_code
        for i in tl.static_range(1, 3):
            column = 2 * window + i
            last, last_code = _window_column(
                z,
                first,
                there,
                2 * row,
                column,
                height,
                width,
                bias,
                k,
                scale,
                channels,
                relu_first,
            )
            best, code = _maximum(best, code, last, last_code + i)
        if not relu_first:
            code = tl.where(best <= 0, NOWHERE, code)
            best = tl.where(best < 0, 0.0, best)
        at = (out + window * channels)[:, None] + tl.arange(0, 8)[None, :]
        tl.store(out_pointer + at, best.to(out_pointer.dtype.element_ty), there[0][:, None])
        tl.store(code_pointer + at, code.to(tl.uint8), there[0][:, None])


@triton.jit
def _normalization_backward(a, sums, grad, k, scale, relu: tl.constexpr):
    """The gradient of z [n, 8]: from that of y and two channels on either side, as columns."""
    direct = ()  # grad * s ** -0.75, of these neighbors too
    terms = ()
    for i in tl.static_range(12):
        root = tl.rsqrt(k + scale * sums[i])
        scaled = grad[i] * (root * tl.sqrt(root))
        direct += (scaled,)
        terms += (scaled * a[i + 2] * (root * root),)
    out, value = (), 0.0
    for i in tl.static_range(8):
        value = terms[i] + terms[i + 1] + terms[i + 2] + terms[i + 3] + terms[i + 4]
        value = direct[i + 2] - 1.5 * scale * a[i + 4] * value
        out += (tl.where(a[i + 4] > 0, value, 0.0) if relu else value,)
    return _join(out)


@triton.jit
def _backward(
    z_pointer, bias_pointer, grad_pointer, code_pointer, out_pointer, bias_grad_pointer, count, k,
    scale, height, out_height, width: tl.constexpr, out_width: tl.constexpr, channels: tl.constexpr,
    per_group: tl.constexpr, relu_first: tl.constexpr, threads: tl.constexpr,
):  # fmt: skip
    """A thread has a row of pixels of an image. A pixel of an even row lies in two rows of windows,
    at the end of the upper and at the beginning of the lower; columns likewise."""
    image, row, first, there = _thread(count, height, channels, per_group, threads)
    work, left, right = there
    pixels = (image.to(tl.int64) * (height * width) * channels)[:, None]
    windows = (image.to(tl.int64) * (out_height * out_width) * channels)[:, None]
    bias = _around(bias_pointer, first, there, 4)
    lower, upper = row // 2, row // 2 - 1
    in_lower = work & (lower < out_height)
    in_upper = work & (row % 2 == 0) & (upper >= 0)
    before = ()  # what comes from the windows to the left
    for _ in tl.static_range(12):
        before += (tl.zeros((threads,), tl.float32),)
    bias_grad = tl.zeros((threads, 8), tl.float32)
    for window in range((width + 1) // 2):
        inside = in_lower & (window < out_width), left, right
        at = (lower * out_width + window) * channels + first
        grads = _around(grad_pointer + windows, at, inside, 2)
        codes = _around(code_pointer + windows, at, inside, 2)
        inside = in_upper & (window < out_width), left, right
        at = (upper * out_width + window) * channels + first
        upper_grads = _around(grad_pointer + windows, at, inside, 2)
        upper_codes = _around(code_pointer + windows, at, inside, 2)
        for i in tl.static_range(3):  # the window's columns; the last is the next one's first
            y_grad = ()
            for c in tl.static_range(12):
                one = tl.where(codes[c] == 3 * (row % 2) + i, grads[c], 0.0)
                other = tl.where(upper_codes[c] == 6 + i, upper_grads[c], 0.0)
                y_grad += (one + other + before[c] if i == 0 else one + other,)
            if i == 2:
                before = y_grad
            else:
                column = 2 * window + i
                here = work & (column < width)
                at = (row * width + column) * channels + first
                a, sums = _activations(
                    z_pointer + pixels, at, (here, left, right), bias, relu_first, 4
                )
                value = _normalization_backward(a, sums, y_grad, k, scale, relu_first)
                bias_grad += tl.where(here[:, None], value, 0.0)
                to = out_pointer + pixels + (at[:, None] + tl.arange(0, 8)[None, :])
                tl.store(to, value.to(out_pointer.dtype.element_ty), here[:, None])
    at = ((image * height + row).to(tl.int64) * channels + first)[:, None]
    tl.store(bias_grad_pointer + at + tl.arange(0, 8)[None, :], bias_grad, work[:, None])


@torch.library.custom_op("alexnet_dist::norm_pool", mutates_args=())
def norm_pool(
    z: Tensor, bias: Tensor, k: float, scale: float, groups: int, relu_first: bool
) -> tuple[Tensor, Tensor]:
    """Bias, normalization, pooling and ReLU, in float32; see above.

    Args:
        z: a convolution's output without its bias [B, C, H, W], in 16 or 32 bits; C a multiple of
            8 * ``groups``.
        bias: float32 [C].
        k, scale: of the normalization; a sum of squares never leaves one of ``groups``.
        relu_first: ReLU before the normalization, else behind the pooling.

    Returns:
        The pooled map [B, C, H', W'], channels last, in z's dtype, where the last window may hang
        over the edge; and, uint8, where in its window each maximum was.
    """
    z = z.contiguous(memory_format=torch.channels_last)
    out, code = _outputs(z)
    batch, channels, height, width = z.shape
    count = batch * out.shape[2] * (channels // 8)
    sizes = height, out.shape[2], width, out.shape[3]
    constants = channels, channels // groups // 8, relu_first, THREADS
    if count:
        _forward[(triton.cdiv(count, THREADS),)](
            *(z, bias, out, code, count, k, scale, *sizes, *constants)
        )
    return out, code


@torch.library.custom_op("alexnet_dist::norm_pool_backward", mutates_args=())
def norm_pool_backward(
    z: Tensor,
    bias: Tensor,
    grad: Tensor,
    code: Tensor,
    k: float,
    scale: float,
    groups: int,
    relu_first: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of z [B, C, H, W] and of the bias, float32 [C], from that of ``norm_pool``."""
    z, grad = (x.contiguous(memory_format=torch.channels_last) for x in (z, grad.to(z.dtype)))
    z_grad = torch.empty_like(z)
    batch, channels, height, width = z.shape
    bias_grad = bias.new_empty(batch * height, channels)
    count = batch * height * (channels // 8)
    sizes = height, code.shape[2], width, code.shape[3]
    constants = channels, channels // groups // 8, relu_first, THREADS
    if count:
        _backward[(triton.cdiv(count, THREADS),)](
            *(z, bias, grad, code, z_grad, bias_grad, count, k, scale, *sizes, *constants)
        )
    return z_grad, bias_grad.sum(0)


def _outputs(z: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Memory for what ``norm_pool`` returns."""
    size = [-((3 - side) // 2) + 1 for side in z.shape[2:]]  # rounded up
    shape = (*z.shape[:2], *size)
    out = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    return out, torch.empty_like(out, dtype=torch.uint8)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, bias, *ctx.constants = inputs
    ctx.save_for_backward(z, bias, output[1])


def _backward_op(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    z, bias, code = ctx.saved_tensors
    return *norm_pool_backward(z, bias, grad, code, *ctx.constants), None, None, None, None


norm_pool.register_fake(_outputs)
norm_pool_backward.register_fake(lambda z, bias, *_: (torch.empty_like(z), torch.empty_like(bias)))
norm_pool.register_autograd(_backward_op, setup_context=_setup_context)
