"""Which of DALI's decoders works on this machine, tried in processes of their own."""

import functools
import subprocess
import sys
from contextlib import suppress
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from alexnet_dist.data.dali import Decoder, build_pipeline, feed_batch
from alexnet_dist.data.eval_plan import EvalPlan
from alexnet_dist.data.transforms import Normalization


@functools.cache
def probe_decoder(device: torch.device) -> Decoder:
    """The best decoder that works here: roi, full or cpu.

    Decoding a region on a GPU ends some machines' processes by a fault that no exception can
    catch (NVIDIA/nvImageCodec issue 55), so each is tried in a process of its own first.
    """
    if device.type != "cuda":
        return "roi"
    candidates: tuple[Decoder, ...] = ("roi", "full")
    for decoder in candidates:
        command = [sys.executable, "-m", "alexnet_dist.data.dali_probe", decoder]
        command.append(str(device.index or 0))
        with suppress(subprocess.TimeoutExpired):
            if subprocess.run(command, capture_output=True, timeout=120).returncode == 0:
                return decoder
    return "cpu"


def _probe(decoder: Decoder, device: torch.device) -> None:
    """Decode JPEGs of several kinds as the loader would; for ``probe_decoder``."""
    normalization = Normalization(np.zeros(3), np.ones(3), np.zeros((3, 3)), 224)
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    encoded = []
    for mode, options in (("RGB", {}), ("RGB", {"progressive": True}), ("L", {})):
        buffer = BytesIO()
        Image.fromarray(noise).convert(mode).save(buffer, "JPEG", **options)
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    encoded = encoded * 8
    count = len(encoded)
    samples = EvalPlan(np.tile([300, 400], (count, 1)), count).samples(np.arange(count))
    pipeline = build_pipeline(
        normalization, device=device, decoder=decoder, resize=True, max_batch_size=count, threads=2
    )
    for _ in range(4):
        feed_batch(pipeline, encoded, samples, normalization)
        images = torch.from_dlpack(pipeline.run()[0].as_tensor())
        if not bool(torch.isfinite(images).all()):
            raise RuntimeError("the decoded images are not finite")


if __name__ == "__main__":
    _probe(sys.argv[1], torch.device("cuda", int(sys.argv[2])))  # type: ignore[arg-type]
