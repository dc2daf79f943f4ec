"""Which of DALI's decoders works here and is fastest, tried in processes of their own."""

import fcntl
import functools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from alexnet_dist.data.dali import Decoder, build_pipeline, feed_batch
from alexnet_dist.data.eval_plan import EvalPlan
from alexnet_dist.data.normalization import Normalization

PROBES = 5


@functools.cache
def probe_decoder(device: torch.device) -> Decoder:
    """The fastest decoder that works here: roi, full or cpu.

    Decoding a region on a GPU ends some machines' processes by a fault that no exception can
    catch (NVIDIA/nvImageCodec issue 55), and older libraries do it on the CPU without a word. So
    each is tried in a process of its own, by one process of this machine, while the others wait
    for its answer; a file in the folder for temporary files remembers it.
    """
    if device.type != "cuda":
        return "roi"
    folder = Path(tempfile.gettempdir(), f"alexnet_dist-{os.getuid()}")
    try:
        folder.mkdir(exist_ok=True, mode=0o700)
        with (folder / "decoder.json").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            return _remembered(file, device)
    except (OSError, ValueError):  # nothing can be remembered there
        return _fastest(device)


def _remembered(file: IO[str], device: torch.device) -> Decoder:
    """What ``file`` says, or else what is found out, and written there."""
    from nvidia.dali import __version__ as dali_version  # whichever CUDA its package is for

    key = [torch.cuda.get_device_name(device), torch.__version__, dali_version]
    known = json.loads(file.read() or "{}")
    if known.get("key") != key:
        known = {"key": key, "decoder": _fastest(device)}
        file.truncate(0)
        json.dump(known, file)
    decoder: Decoder = known["decoder"]
    return decoder


def _fastest(device: torch.device) -> Decoder:
    candidates: tuple[Decoder, ...] = ("roi", "full")
    seconds = {decoder: _time(decoder, device) for decoder in candidates}
    fastest = min(candidates, key=seconds.__getitem__)
    return fastest if seconds[fastest] < math.inf else "cpu"


def _time(decoder: Decoder, device: torch.device) -> float:
    """Seconds that a decoder takes for some images; infinite where it does not work."""
    module = "alexnet_dist.data.dali_probe"
    command = [sys.executable, "-m", module, decoder, str(device.index or 0)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return math.inf
    return float(done.stdout.split()[-1]) if done.returncode == 0 else math.inf


def _probe(decoder: Decoder, device: torch.device) -> None:
    """Decode JPEGs of several kinds as the loader would, and print the seconds of the fastest of
    PROBES times; for ``probe_decoder``."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a fault is expected here
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
    seconds = []
    for _ in range(PROBES):
        begun = time.perf_counter()
        feed_batch(pipeline, encoded, samples, normalization)
        images = torch.from_dlpack(pipeline.run()[0].as_tensor())
        if not bool(torch.isfinite(images).all()):
            raise RuntimeError("the decoded images are not finite")
        seconds.append(time.perf_counter() - begun)
    print(min(seconds))


if __name__ == "__main__":
    _probe(sys.argv[1], torch.device("cuda", int(sys.argv[2])))  # type: ignore[arg-type]
