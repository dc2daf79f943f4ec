"""What becomes of odd and corrupt images: a table of kinds and loaders.

python -m benchmarks.corrupt_images [--out FILE.json]

The kinds are those of tests/data/corrupt_images.py. Corrupt files take the place of good ones that
are in the index, as in a run that has begun. With a GPU, DALI's two ways of decoding there are in
the table too.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from alexnet_dist.data.corrupt_images import Loader
from alexnet_dist.data.dali import DaliLoader
from alexnet_dist.data.dali_probe import probe_decoder
from alexnet_dist.data.datasets import ImageDataset
from alexnet_dist.data.index import open_datasets, scan_dataset
from alexnet_dist.data.plan import SamplePlan
from alexnet_dist.data.torch_loader import TorchLoader
from alexnet_dist.data.transforms import Normalization
from benchmarks.common import save_record
from tests.data.corrupt_images import (
    corrupt_files,
    corrupt_inside,
    encode,
    odd_images,
    photograph,
    put,
    write_folder,
)

SIZE = 64
CPU = torch.device("cpu")
REFERENCE = "DataLoader"


def loaders() -> dict[str, Any]:
    """What makes each loader of a dataset and a normalization, by its name."""
    dali: dict[str, Any] = {"max_batch_size": 1, "resize": True, "threads": 2, "on_corrupt": "skip"}
    found: dict[str, Any] = {
        REFERENCE: partial(TorchLoader, device=CPU, threads=0, on_corrupt="skip"),
        "DALI on CPUs": partial(DaliLoader, device=CPU, decoder="roi", **dali),
    }
    if torch.cuda.is_available():
        gpu = torch.device("cuda", 0)
        for decoder in ("roi", "full") if probe_decoder(gpu) == "roi" else ("full",):
            found[f"DALI on a GPU, {decoder}"] = partial(
                DaliLoader, device=gpu, decoder=decoder, **dali
            )
    return found


def load_one(loader: Loader, plan: SamplePlan, index: int) -> tuple[torch.Tensor | None, str]:
    """An image, or why there is none."""
    samples = plan.sample(0, 0)
    (batch,) = loader.batches([samples.select(samples.indices == index)])
    events = loader.corrupt.pop_events()
    return (None, str(events[0]["reason"])) if events else (batch.images[0].cpu(), "")


def fill(folder: Path) -> tuple[ImageDataset, dict[str, int]]:
    """Files of all kinds in ``folder``, and their indices."""
    plain = encode(photograph(), "JPEG", quality=90)
    corrupt = corrupt_files() | corrupt_inside()
    paths = write_folder(folder, odd_images() | dict.fromkeys(corrupt, plain))
    dataset = open_datasets(scan_dataset(str(folder), str(folder), lambda *_: None))[0]
    for kind, content in corrupt.items():
        put(paths[kind], content)
    return dataset, {kind: dataset.index.names.index(f"all/{p.name}") for kind, p in paths.items()}


def measure(folder: Path) -> list[dict[str, Any]]:
    """A row for each kind and loader."""
    dataset, indices = fill(folder)
    plan = SamplePlan(dataset.index.sizes, len(dataset.index), 3, crop_fraction=SIZE / 96)
    normalization = Normalization(np.zeros(3), np.ones(3), np.zeros((3, 3)), SIZE)
    running = {name: make(dataset, normalization) for name, make in loaders().items()}
    rows: list[dict[str, Any]] = []
    for kind, index in indices.items():
        reference = None
        for name, loader in running.items():
            image, reason = load_one(loader, plan, index)
            row = {"kind": kind, "loader": name, "decoded": image is not None}
            if image is None:
                row["reason"] = reason
            elif name == REFERENCE:
                reference = image
            elif reference is not None:
                row["difference"] = round(float((image - reference).abs().mean()), 3)
            rows.append(row)
    for loader in running.values():
        loader.close()
    return rows


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each kind, a column for each loader."""
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        text = "decoded" if row["decoded"] else f"named: {row['reason']}"
        text += f", differs by {row['difference']:g} of 255" if "difference" in row else ""
        table.setdefault(row["kind"], {})[row["loader"]] = text
    names = list(next(iter(table.values())))
    lines = [["kind", *names], ["---"] * (1 + len(names))]
    lines += [[kind, *(texts[name] for name in names)] for kind, texts in table.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    print(to_markdown(rows))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    save_record("corrupt_images.py", {"pillow": PIL.__version__, "rows": rows}, out, device)


if __name__ == "__main__":
    main()
