"""What becomes of odd and damaged images: a table of kinds and engines.

python -m benchmarks.corrupt_images [--out FILE.json]

The kinds are those of tests/data/corrupt_images.py. Damaged files take the place of good ones that
are in the index, as in a run that has begun. With a GPU, DALI's two ways of decoding there are in
the table too.
"""

import argparse
import json
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from alexnet_dist.data.corrupt_images import Loader
from alexnet_dist.data.dali import DaliLoader, probe_decoder
from alexnet_dist.data.datasets import ImageDataset, open_datasets, scan_dataset
from alexnet_dist.data.formats import parse_jpeg_size, validate_bytes
from alexnet_dist.data.plan import SamplePlan
from alexnet_dist.data.torch_loader import TorchLoader
from alexnet_dist.data.transforms import Normalization
from benchmarks.common import machine_info
from tests.data.corrupt_images import (
    damaged,
    encode,
    inwardly_damaged,
    photograph,
    put,
    whole,
    write_folder,
)

SIDE = 64
CPU = torch.device("cpu")
REFERENCE = "DataLoader"


def engines() -> dict[str, Any]:
    """What makes each engine of a source, by its name."""
    shared: dict[str, Any] = {"on_corrupt": "skip"}
    dali: dict[str, Any] = {"max_batch_size": 1, "resize": True, "threads": 2, **shared}
    found: dict[str, Any] = {
        REFERENCE: partial(TorchLoader, device=CPU, threads=0, **shared),
        "DALI on CPUs": partial(DaliLoader, device=CPU, decoder="roi", **dali),
    }
    if torch.cuda.is_available():
        gpu = torch.device("cuda", 0)
        works = probe_decoder(gpu)
        for decoder in ("roi", "full"):
            if decoder == "full" or works == "roi":
                make = partial(DaliLoader, device=gpu, decoder=decoder, **dali)
                found[f"DALI on a GPU, {decoder}"] = make
    return found


def outcome(engine: Loader, plan: SamplePlan, index: int) -> tuple[torch.Tensor | None, str]:
    """The finished image, or why there is none."""
    draws = plan.sample(0, 0)
    (batch,) = engine.batches([draws.select(draws.indices == index)])
    news = engine.corrupt.pop_events()
    return (None, str(news[0]["reason"])) if news else (batch.images[0].cpu(), "")


def fill(folder: Path) -> tuple[ImageDataset, dict[str, int]]:
    """Files of all kinds in ``folder``, and their indices in the index."""
    plain = encode(photograph(), "JPEG", quality=90)
    bad = damaged() | inwardly_damaged()
    paths = write_folder(folder, whole() | dict.fromkeys(bad, plain))
    source = open_datasets(scan_dataset(str(folder), str(folder), lambda *_: None))[0]
    for kind, content in bad.items():
        put(paths[kind], content)
    return source, {kind: source.index.names.index(f"all/{p.name}") for kind, p in paths.items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    """One for each kind and engine."""
    source, indices = fill(folder)
    plan = SamplePlan(source.index.sizes, len(source.index), 3, crop_fraction=SIDE / 96)
    pixels = Normalization(np.zeros(3), np.ones(3), np.zeros((3, 3)), SIDE)
    running = {name: make(source, pixels) for name, make in engines().items()}
    found: list[dict[str, Any]] = []
    for kind, index in indices.items():
        reference = None
        for name, engine in running.items():
            image, reason = outcome(engine, plan, index)
            row = {"kind": kind, "engine": name, "decoded": image is not None}
            if image is None:
                row["reason"] = reason
            elif name == REFERENCE:
                reference = image
            elif reference is not None:
                row["differs"] = round(float((image - reference).abs().mean()), 3)
            found.append(row)
    for engine in running.values():
        engine.close()
    return found


def words(row: dict[str, Any]) -> str:
    if not row["decoded"]:
        return f"named: {row['reason']}"
    return "decoded" + (f", differs by {row['differs']:g} of 255" if "differs" in row else "")


def markdown(found: list[dict[str, Any]]) -> str:
    """A line for each kind, a column for each engine."""
    table: dict[str, dict[str, str]] = {}
    for row in found:
        table.setdefault(row["kind"], {})[row["engine"]] = words(row)
    names = list(next(iter(table.values())))
    lines = [["kind", *names], ["---"] * (1 + len(names))]
    lines += [[kind, *(said[name] for name in names)] for kind, said in table.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def microseconds() -> dict[str, float]:
    """What looking at a good JPEG before it is decoded costs, the least of ten tries."""
    from nvidia.nvimgcodec import CodeStream

    encoded = np.frombuffer(encode(photograph(224, 224), "JPEG"), np.uint8)

    def parse() -> Any:
        header = CodeStream(encoded)
        return header.height, header.width, header.dtype

    ways: dict[str, Callable[[], Any]] = {
        "its end": lambda: validate_bytes(encoded),
        "its header, if it is plain": lambda: parse_jpeg_size(encoded),
        "its header, by DALI's parser": parse,
    }
    return {
        name: round(min(timeit.repeat(way, number=5000, repeat=10)) / 5000 * 1e6, 2)
        for name, way in ways.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    out = parser.parse_args().out

    with tempfile.TemporaryDirectory() as folder:
        found = rows(Path(folder))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    record = {
        "what": "benchmarks/corrupt_images.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_info(device) | {"pillow": PIL.__version__},
        "microseconds_for_a_good_image": microseconds(),
        "rows": found,
    }
    print(markdown(found))
    print(json.dumps(record["microseconds_for_a_good_image"]))
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
