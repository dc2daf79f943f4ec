"""The DALI engine: decoding, crop, resize, flip, colours and mean in one pipeline on the GPU, a
batch or more ahead of the training step. On CPUs DALI decodes the crops, and the rest is done as
for raw pixels: torch resizes bytes there sooner than DALI.

DALI draws nothing: bytes, boxes, flips and means come from the plan through external sources. The
samples' indices travel with them, so that what comes out says itself what it is.
"""

import functools
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from alexnet_dist.data import corrupt_images
from alexnet_dist.data.corrupt_images import Batch, CorruptImagePolicy, OnCorruptImage
from alexnet_dist.data.finishing import Finishing, Threads
from alexnet_dist.data.formats import DECODE_ERROR, SIZE_MISMATCH, parse_jpeg_size
from alexnet_dist.data.plan import SampleParams
from alexnet_dist.data.sources import ImageDataset
from alexnet_dist.data.transforms import Normalization
from alexnet_dist.errors import UserError

Decoder = Literal["roi", "full", "cpu", "none"]

HARDWARE_SHARE = 0.65
"""Part of the images that a GPU's own JPEG engine decodes, where there is one."""

_READ_TOGETHER = 16
"""Files that a thread reads in a row: handing over one at a time costs more than reading it."""

_AT_ONCE = {"cpu": 2, "cuda": 1}
"""Batches under way, each in a pipeline of its own. On CPUs the threads of one have nothing to do
while it is fed and its last images are decoded, which is an eighth of the time."""

_Answers = Callable[[], list[NDArray[np.uint8] | OSError]]
"""Waits for what was read of a batch's images."""


def available() -> bool:
    """Whether DALI is installed here."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


def build_pipeline(
    *,
    max_batch_size: int,
    threads: int,
    device: torch.device,
    decoder: Decoder,
    resize: bool,
    pixels: Normalization,
    hw_decoder_load: float = HARDWARE_SHARE,
) -> Any:
    """A pipeline that is fed by name: encoded, start, shape; index; on a GPU mirror, mean, std.
    Where there is nothing to decode, cut pixels [h, w, 3] take the place of the first three.

    Outputs: images, on a GPU finished ones [b, side, side, 3], float32, on a CPU the crops as they
    are stored, uint8 [h, w, 3]; and the samples' indices, int64.
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
    with pipeline:

        def feed(name: str, dtype: Any, ndim: int, **options: Any) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim, batch=True, **options)

        index = feed("index", types.INT64, 0)
        if decoder == "none":
            images = feed("pixels", types.UINT8, 3, layout="HWC", no_copy=True)
            images = images.gpu() if gpu else images
        else:
            encoded = feed("encoded", types.UINT8, 1, no_copy=True)
            start = feed("start", types.INT32, 1)
            shape = feed("shape", types.INT32, 1)
            images = decode_and_crop(encoded, start, shape, decoder, gpu, hw_decoder_load)
        if gpu:
            if resize:
                images = fn.resize(images, size=[pixels.size, pixels.size], antialias=True)
            images = fn.crop_mirror_normalize(
                images,
                mean=feed("mean", types.FLOAT, 1),
                std=feed("std", types.FLOAT, 1),
                mirror=feed("mirror", types.INT32, 0),
                dtype=types.FLOAT,
                output_layout="HWC",
            )
        pipeline.set_outputs(images, index)
    pipeline.build()
    return pipeline


def decode_and_crop(
    encoded: Any,
    start: Any,
    shape: Any,
    decoder: Decoder,
    gpu: bool,
    hw_decoder_load: float = HARDWARE_SHARE,
) -> Any:
    """The boxes of encoded images, as part of a pipeline."""
    from nvidia.dali import fn, types

    mixed = gpu and decoder != "cpu"
    options: dict[str, Any] = {
        "device": "mixed" if mixed else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,  # the index and the boxes know the stored orientation
    }
    if mixed:
        options |= {"jpeg_fancy_upsampling": True, "hw_decoder_load": hw_decoder_load}
    if decoder == "full":
        images = fn.decoders.image(encoded, **options)
        return fn.slice(images, start=start, shape=shape, axis_names="HW")
    images = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", **options)
    return images.gpu() if gpu and not mixed else images


def feed(
    pipeline: Any,
    encoded: list[NDArray[np.uint8]],
    draws: SampleParams,
    pixels: Normalization,
    device: torch.device,
) -> None:
    """Feed one batch to a pipeline of ``build_pipeline``: ``encoded`` bytes, or cut pixels."""
    if encoded[0].ndim == 3:
        pipeline.feed_input("pixels", encoded)
    else:
        pipeline.feed_input("encoded", encoded)
        pipeline.feed_input("start", draws.crop_boxes[:, :2].astype(np.int32))
        pipeline.feed_input("shape", draws.crop_boxes[:, 2:].astype(np.int32))
    pipeline.feed_input("index", np.ascontiguousarray(draws.indices))
    if device.type == "cuda":
        pipeline.feed_input("mirror", draws.flips.astype(np.int32))
        pipeline.feed_input("mean", pixels.means(draws))
        stds = pixels.stds(draws.pca_noise_std)
        pipeline.feed_input("std", np.ascontiguousarray(np.broadcast_to(stds, (len(encoded), 3))))


@functools.cache
def probe_decoder(device: torch.device) -> Decoder:
    """The best decoder that works here: roi, full or cpu.

    Decoding a region on a GPU ends some machines' processes by a fault that no exception can
    catch (NVIDIA/nvImageCodec issue 55), so each is tried in a process of its own first.
    """
    if device.type != "cuda":
        return "roi"
    options: tuple[Decoder, ...] = ("roi", "full")
    for decoder in options:
        command = [sys.executable, "-m", "alexnet_dist.data.dali", decoder, str(device.index or 0)]
        try:
            if subprocess.run(command, capture_output=True, timeout=120).returncode == 0:
                return decoder
        except subprocess.TimeoutExpired:
            continue
    return "cpu"


def _probe(decoder: Decoder, device: torch.device) -> None:
    """Decode a few images of several kinds as the engine would; for ``probe_decoder``."""
    pixels = Normalization(np.zeros(3), np.ones(3), np.zeros((3, 3)), 224)
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    encoded = []
    for mode, options in (("RGB", {}), ("RGB", {"progressive": True}), ("L", {})):
        buffer = BytesIO()
        Image.fromarray(noise).convert(mode).save(buffer, "JPEG", **options)
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    encoded = encoded * 8
    count = len(encoded)
    boxes = np.tile([20, 30, 224, 224], (count, 1))
    draws = SampleParams(
        np.arange(count), boxes, np.zeros(count, bool), np.zeros((count, 3)), lambda n: boxes
    )
    pipeline = build_pipeline(
        max_batch_size=count, threads=2, device=device, decoder=decoder, resize=True, pixels=pixels
    )
    for _ in range(4):
        feed(pipeline, encoded, draws, pixels, device)
        images = torch.from_dlpack(pipeline.run()[0].as_tensor())
        if not bool(torch.isfinite(images).all()):
            raise RuntimeError("the decoded images are not finite")


class DaliLoader:
    """Carries out draws with DALI, in threads that stay ahead of the training step.

    Args:
        max_batch: the most images that draws may have.
        decoder: as ``probe_decoder`` gives it; "none" where the source is raw.
        resize: whether any box may have another size than the finished image; for a GPU.
        threads: of DALI's own for each batch under way, and as many that finish batches.
        ahead: finished batches that may wait.
    """

    def __init__(
        self,
        source: ImageDataset,
        pixels: Normalization,
        *,
        max_batch_size: int,
        device: torch.device,
        decoder: Decoder,
        resize: bool,
        threads: int,
        prefetch: int = 2,
        on_corrupt: OnCorruptImage = "stop",
    ) -> None:
        from nvidia.nvimgcodec import CodeStream

        self.source, self.pixels, self.device = source, pixels, device
        self.corrupt = CorruptImagePolicy(source, on_corrupt)
        self._parse = CodeStream
        self.ahead = prefetch
        self._build = functools.partial(
            build_pipeline,
            max_batch_size=max_batch_size,
            threads=threads,
            device=device,
            decoder=decoder,
            resize=resize,
            pixels=pixels,
        )
        self._at_once = _AT_ONCE[device.type]
        self._idle = [self._build() for _ in range(self._at_once)]
        self._workers = ThreadPoolExecutor(self._at_once, thread_name_prefix="decode")
        self._threads = Threads(threads)
        self._finishing = Finishing(pixels, max_batch=max_batch_size, threads=self._threads)
        self._readers = ThreadPoolExecutor(max(threads, 8), thread_name_prefix="read")
        self._labels = torch.from_numpy(source.index.labels)
        does = {
            "roi": "decoding the region",
            "full": "decoding the whole image",
            "cpu": "decoding the region on the CPU",
            "none": "of raw pixels",
        }
        self.description = f"DALI on {device.type}, {does[decoder]}, {threads} threads"

    def batches(self, draws: Iterable[SampleParams]) -> Generator[Batch, None, None]:
        """One finished batch for each of ``draws``, in order.

        Raises:
            Failure: an image cannot be decoded and the policy is to stop.
        """
        return corrupt_images.prefetch(self._in_order(draws), self.ahead, self.device)

    def close(self) -> None:
        self._workers.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        self._threads.close()

    def _in_order(self, draws: Iterable[SampleParams]) -> Iterator[Batch]:
        under_way: deque[tuple[SampleParams, Future[Batch]]] = deque()

        def oldest() -> Batch:
            planned, future = under_way.popleft()
            batch = future.result()
            self.corrupt.log_substitutions(planned)
            return batch

        for planned, answers in self._read_ahead(draws):
            under_way.append((planned, self._workers.submit(self._finish, planned, answers)))
            if len(under_way) == self._at_once:
                yield oldest()
        while under_way:
            yield oldest()

    def _read_all(
        self, draws: SampleParams, rows: slice = slice(None)
    ) -> list[NDArray[np.uint8] | OSError]:
        indices, boxes = draws.indices[rows].tolist(), draws.crop_boxes[rows].tolist()
        return [self._read(index, box) for index, box in zip(indices, boxes, strict=True)]

    def _read(self, index: int, box: list[int]) -> NDArray[np.uint8] | OSError:
        """The bytes of an image, or the pixels in the box, or why DALI is not to have them.

        DALI 2.4 may end in a segmentation fault where a header cannot be read, has pixels of no
        known type, or makes an image that the box does not fit into: it leaves the function whose
        threads still parse the rest of the batch. So every header is read before, by DALI's own
        parser unless it is as plain as nearly all are.
        """
        if self.source.is_decoded:
            top, left, height, width = box  # cut here: DALI's own slice takes three times as long
            pixels = self.source.read(index)[top : top + height, left : left + width]
            return np.ascontiguousarray(pixels)
        try:
            encoded = self.source.read(index)
        except OSError as error:
            return error
        size = parse_jpeg_size(encoded) or self._parsed_size(encoded)
        if size is None:
            return OSError(DECODE_ERROR)
        if size != self.source.index.sizes[index].tolist():
            return OSError(SIZE_MISMATCH)
        return encoded

    def _parsed_size(self, encoded: NDArray[np.uint8]) -> list[int] | None:
        try:
            header = self._parse(encoded)
            size, _ = [header.height, header.width], header.dtype
        except (RuntimeError, TypeError):
            return None
        return size

    def _read_ahead(self, draws: Iterable[SampleParams]) -> Iterator[tuple[SampleParams, _Answers]]:
        """Each of ``draws`` with its bytes, which are read while the one before is decoded."""

        def ask(item: SampleParams) -> tuple[SampleParams, _Answers]:
            parts = [
                slice(at, at + _READ_TOGETHER) for at in range(0, len(item.indices), _READ_TOGETHER)
            ]
            answers = self._readers.map(lambda rows: self._read_all(item, rows), parts)
            return item, lambda: [one for part in answers for one in part]

        before = None
        for item in draws:
            asked = ask(item)
            if before is not None:
                yield before
            before = asked
        if before is not None:
            yield before

    def _finish(self, planned: SampleParams, answers: _Answers) -> Batch:
        draws, read = planned, answers()
        while True:
            for index, answer in zip(draws.indices.tolist(), read, strict=True):
                if index in self.corrupt.errors:
                    continue
                if isinstance(answer, OSError):
                    self.corrupt.mark_corrupt(index, answer.strerror or str(answer))
            if not any(n in self.corrupt.errors for n in draws.indices.tolist()):
                encoded = [one for one in read if not isinstance(one, OSError)]  # all of them
                try:
                    return self._run(draws, encoded)
                except Exception as error:
                    self._find_bad(draws, encoded, error)
            draws = self.corrupt.substitute(planned)
            read = self._read_all(draws)

    def _run(self, draws: SampleParams, encoded: list[NDArray[np.uint8]]) -> Batch:
        side = self.pixels.size
        if len(draws.indices) == 0:
            images = torch.empty(0, 3, side, side, device=self.device)
            return Batch(images, self._labels[:0].to(self.device), draws.indices)
        with self._pipeline() as pipeline:
            feed(pipeline, encoded, draws, self.pixels, self.device)
            images, out = pipeline.run()
        indices = torch.from_dlpack(out.as_tensor())
        labels = self._labels[indices]
        if self.device.type == "cuda":
            labels = labels.pin_memory().to(self.device, non_blocking=True)
            # DALI's own memory, seen as [b, 3, H, W]; it is given back when torch lets go of it
            finished = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        else:
            whole = draws.crop_boxes * np.array([0, 0, 1, 1])  # DALI has cut them
            finished = self._finishing(_arrays(images), np.arange(len(images)), whole, draws)
        return Batch(finished, labels, indices.numpy().copy())

    @contextmanager
    def _pipeline(self) -> Iterator[Any]:
        """One that is idle. However it fails, it is not to be trusted with the order, and built
        anew."""
        pipeline = self._idle.pop()
        try:
            yield pipeline
        except Exception:
            pipeline = self._build()
            raise
        finally:
            self._idle.append(pipeline)

    def _find_bad(
        self, draws: SampleParams, encoded: list[NDArray[np.uint8]], error: Exception
    ) -> None:
        """Note which images made a batch fail: the one that DALI names, which need not fail alone
        or on the CPU; else those that do, decoded one by one in a pipeline of one."""
        cause = str(error).rpartition("encountered:")[2].strip()
        named = re.search(r"Failed to decode sample #(\d+)", cause)
        if named:
            self.corrupt.mark_corrupt(int(draws.indices[int(named[1])]), DECODE_ERROR)
            return
        cpu = torch.device("cpu")
        alone: Any = None
        any_bad = False
        for row, index in enumerate(draws.indices.tolist()):
            alone = alone or build_pipeline(
                max_batch_size=1,
                threads=1,
                device=cpu,
                decoder="none" if self.source.is_decoded else "roi",
                resize=True,
                pixels=self.pixels,
            )
            one = draws.select(np.arange(len(encoded)) == row)
            feed(alone, [encoded[row]], one, self.pixels, cpu)
            try:
                alone.run()
            except Exception:
                alone, any_bad = None, True
                self.corrupt.mark_corrupt(index, DECODE_ERROR)
        if not any_bad:
            first = cause.partition("\n")[0] or type(error).__name__
            raise UserError(f"DALI failed on a batch whose images decode one by one: {first}")


def _arrays(images: Any) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
    """DALI's own memory: as one array [b, h, w, 3] where the images are of one size."""
    if images.is_dense_tensor():
        return np.asarray(images.as_tensor())
    return [np.asarray(image) for image in images]


if __name__ == "__main__":
    _probe(sys.argv[1], torch.device("cuda", int(sys.argv[2])))  # type: ignore[arg-type]
