"""The DALI loader: decoding, crop, resize, flip and normalization in one graph on a GPU or on CPUs.

DALI makes nothing up: bytes, crop boxes, flips and means come from the plan through external
sources. The samples' indices travel with them, so that a batch says itself what it is. Two
pipelines take turns: one is fed, and parses its images, while the other decodes.
"""

import functools
import re
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.decode import DECODE_ERROR, SIZE_MISMATCH, decode
from alexnet_dist.data.loader import Batch, CorruptImagesError, Loader, to_device
from alexnet_dist.data.normalization import Normalization
from alexnet_dist.data.plan import Ints, SampleParams
from alexnet_dist.errors import UserError

Decoder = Literal["roi", "full", "cpu", "none"]
"""Decode the crop box, or the full image and crop it, on the device; the crop box on the CPU; or
nothing, as the images are pixels."""

HW_DECODER_LOAD = 0.65
"""Fraction of the images that a GPU's JPEG engine decodes, where there is one."""

READ_CHUNK = 16
"""Files that a thread reads at a time: handing over a single one costs more than reading it."""


def available() -> bool:
    """Whether DALI is installed."""
    return bool(find_spec("nvidia") and find_spec("nvidia.dali"))


def build_pipeline(
    normalization: Normalization,
    *,
    device: torch.device,
    decoder: Decoder,
    resize: bool,
    max_batch_size: int,
    threads: int,
) -> Any:
    """A pipeline for ``feed_batch``.

    Args:
        resize: whether any crop box has another side than ``normalization.size``.

    Its outputs: images [b, size, size, 3], float32, on ``device``; and their indices [b], int64.
    """
    from nvidia.dali import Pipeline, fn, types

    gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=max_batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    source = functools.partial(fn.external_source, batch=True)
    with pipeline:
        if decoder == "none":
            images = source(name="pixels", dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True)
            images = images.gpu() if gpu else images
        else:
            encoded = source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            start = source(name="start", dtype=types.INT32, ndim=1)
            shape = source(name="shape", dtype=types.INT32, ndim=1)
            images = decode_and_crop(encoded, start, shape, decoder, gpu)
        if resize:
            size = [normalization.size] * 2
            images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            mean=source(name="mean", dtype=types.FLOAT, ndim=1),
            std=source(name="std", dtype=types.FLOAT, ndim=1),
            mirror=source(name="mirror", dtype=types.INT32, ndim=0),
            dtype=types.FLOAT,
            output_layout="HWC",
        )
        pipeline.set_outputs(images, source(name="index", dtype=types.INT64, ndim=0))
    pipeline.build()
    return pipeline


def decode_and_crop(encoded: Any, start: Any, shape: Any, decoder: Decoder, gpu: bool) -> Any:
    """Part of a pipeline: the boxes at ``start`` of ``shape`` (height, width) of encoded images."""
    from nvidia.dali import fn, types

    mixed = gpu and decoder != "cpu"
    options: dict[str, Any] = {
        "device": "mixed" if mixed else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,  # index and boxes know the stored orientation
    }
    if mixed:
        options |= {"jpeg_fancy_upsampling": True, "hw_decoder_load": HW_DECODER_LOAD}
    if decoder == "full":
        images = fn.decoders.image(encoded, **options)
        return fn.slice(images, start=start, shape=shape, axis_names="HW")
    images = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", **options)
    return images.gpu() if gpu and not mixed else images


def feed_batch(
    pipeline: Any,
    images: list[NDArray[np.uint8]],
    samples: SampleParams,
    normalization: Normalization,
) -> None:
    """Feed ``images`` [b] to a pipeline: their encoded bytes, or the pixels [h, w, 3] in their crop
    boxes. They must not be freed before it has run."""
    if images[0].ndim == 3:
        pipeline.feed_input("pixels", images)
    else:
        pipeline.feed_input("encoded", images)
        pipeline.feed_input("start", samples.crop_boxes[:, :2].astype(np.int32))
        pipeline.feed_input("shape", samples.crop_boxes[:, 2:].astype(np.int32))
    pipeline.feed_input("mean", normalization.means(samples))
    stds = normalization.stds(samples.pca_noise_std)
    pipeline.feed_input("std", np.tile(stds, (len(images), 1)))
    pipeline.feed_input("mirror", samples.flips.astype(np.int32))
    pipeline.feed_input("index", np.ascontiguousarray(samples.indices))


class DaliLoader(Loader):
    """Loads samples with DALI.

    Args:
        decoder: as ``probe_decoder`` returns it; "none" where the dataset holds pixels.
        resize: whether any crop box has another side than ``normalization.size``.
        max_batch_size: the most samples in a batch of this process.
        options: those of Loader; ``threads`` are of each pipeline.
    """

    min_readers = 8  # storage answers late

    def __init__(
        self,
        dataset: ImageDataset,
        normalization: Normalization,
        *,
        decoder: Decoder,
        resize: bool,
        max_batch_size: int,
        **options: Any,
    ) -> None:
        from nvidia.nvimgcodec import CodeStream

        super().__init__(dataset, normalization, **options)
        self._parse_header = CodeStream
        self._build = functools.partial(
            build_pipeline,
            normalization,
            device=self.device,
            decoder=decoder,
            resize=resize,
            max_batch_size=max_batch_size,
            threads=self._threads,
        )
        self._idle = [self._build() for _ in range(self.batches_at_once)]
        self.description = f"DALI on {self.device.type}, decoder {decoder}, {self._threads} threads"

    def _load(self, samples: SampleParams) -> Batch:
        images = self._read_each(samples, self._read, READ_CHUNK)
        try:
            return self._run(samples, images)
        except Exception as error:
            raise find_corrupt(samples, images, error) from error

    def _read(self, index: int, box: Ints, flip: bool) -> NDArray[np.uint8]:
        """An image's bytes, or the pixels in its crop box. Raises OSError where DALI is not to have
        them.

        DALI 2.4 may end in a segmentation fault where a header cannot be read, has pixels of no
        known type, or gives a size that the box does not fit into: it leaves the function whose
        threads still parse the rest of the batch. So its own parser reads every header before.
        """
        image = self.dataset.read(index)
        if self.dataset.is_decoded:
            top, left, height, width = box  # cropped here: DALI's slice takes three times as long
            return np.ascontiguousarray(image[top : top + height, left : left + width])
        try:
            header = self._parse_header(image)
            size, _ = [header.height, header.width], header.dtype
        except (RuntimeError, TypeError):
            raise OSError(DECODE_ERROR) from None
        if size != self.dataset.index.sizes[index].tolist():
            raise OSError(SIZE_MISMATCH)
        return image

    def _run(self, samples: SampleParams, images: list[NDArray[np.uint8]]) -> Batch:
        if not images:  # which DALI does not take
            empty = torch.empty(0, 3, *[self.normalization.size] * 2, device=self.device)
            return Batch(empty, self._labels[:0].to(self.device), samples.indices)
        pipeline = self._idle.pop()
        try:
            feed_batch(pipeline, images, samples, self.normalization)
            normalized, out = pipeline.run()
        except Exception:
            pipeline = self._build()  # one that has failed may mix up the order of its batches
            raise
        finally:
            self._idle.append(pipeline)
        indices = np.array(out.as_tensor())
        labels = to_device(self._labels[indices], self.device)
        # DALI's own memory, which it gets back when torch frees the tensor
        tensor = torch.from_dlpack(normalized.as_tensor()).permute(0, 3, 1, 2)
        return Batch(tensor, labels, indices)


def find_corrupt(
    samples: SampleParams, images: list[NDArray[np.uint8]], error: Exception
) -> Exception:
    """What DALI's error means: that the image is corrupt which it names; if it names none, those
    that Pillow cannot decode either; if there is none, a UserError."""
    cause = str(error).rpartition("encountered:")[2].strip()
    rows = [int(row) for row in re.findall(r"Failed to decode sample #(\d+)", cause)[:1]]
    for row, image in enumerate(images) if not rows else ():
        try:
            decode(image)
        except OSError:
            rows.append(row)
    if rows:
        return CorruptImagesError(dict.fromkeys(samples.indices[rows].tolist(), DECODE_ERROR))
    reason = cause.partition("\n")[0] or type(error).__name__
    return UserError(f"DALI failed on a batch of images: {reason}")
