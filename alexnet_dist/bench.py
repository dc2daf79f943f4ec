"""What a recipe makes of this machine, part by part, beside what the hardware allows.

python -m alexnet_dist.bench [--config configs/fast.yaml] [--data.root DIR] [--baseline [DIR]]
Computing alone, loading alone by each engine, both together, evaluating, saving; under torchrun the
layouts, too, and what each waits for. --baseline takes turns with the loop of PyTorch's ImageNet
example, its DataLoader, and NVIDIA's DALI example, on the JPEGs of a folder with train/CLASS/
(data.root, unless another is named); --each turns off, one at a time, what makes computing faster.
Nothing is trained. Dotted options are those of the trainer.
"""

import json
import os
import subprocess
import sys
import time
from argparse import SUPPRESS, Namespace
from pathlib import Path
from typing import Any

import torch

from alexnet_dist.assembly.measures import Measures
from alexnet_dist.assembly.parts import check_network
from alexnet_dist.config import CommandParser, Config, ParsedArgs, parse
from alexnet_dist.data import dali
from alexnet_dist.data.sources import scan_dataset
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.measuring import baseline, report
from alexnet_dist.measuring.machine import machine
from alexnet_dist.measuring.turns import Figure, rounded
from alexnet_dist.parallel.mesh import available_cpus, init_distributed

PROGRAM = "python -m alexnet_dist.bench"
CROPS = ["--data.train_crop=random_resized", "--data.pca_noise=none"]
"""The options with which our engine makes the crops of PyTorch's ImageNet example."""
PLAIN = {"example": baseline.training, "dataloader": baseline.dataloader, "dali": baseline.dali}


def main(arguments: list[str]) -> None:
    """Measure as the command line says."""
    words, dotted = _understand(arguments)
    parsed = parse(dotted, program=PROGRAM, description=__doc__)
    config = parsed.config
    if words.turn in PLAIN:
        print(_plain_turn(words, config.data.batch_size))
        return
    mesh = init_distributed(
        config.runtime.device, config.runtime.threads, config.runtime.hang_timeout
    )
    check_network(config, mesh)
    if words.baseline is not None and mesh.world_size > 1:
        raise UserError(
            "--baseline is for one process: start it without torchrun", on_all_ranks=True
        )
    folder = None if words.baseline is None or words.turn else _folder(words, config)
    mesh = mesh.with_layout(config.parallel.towers)
    measures = Measures(config, mesh, rounds=words.rounds, seconds=words.seconds)
    if words.turn:
        print(measures.turn(words.turn))
        return
    record = _about(parsed, measures, words) | measures.parts(each=words.each)
    if folder is not None:
        record["baseline"] = _baseline(words, dotted, folder)
    record["verdict"] = report.verdict(record)
    if mesh.rank == 0:
        report.show(record)
        if words.out:
            _keep(record, Path(words.out))


def _about(parsed: ParsedArgs, measures: Measures, words: Namespace) -> dict[str, Any]:
    """What is measured, and where."""
    config, mesh, images = parsed.config, measures.mesh, measures.images.catalogue
    return {
        "what": PROGRAM,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(mesh.device),
        "recipe": parsed.recipe,
        "variant": config.model.arch,
        "classes": measures.learner.outputs,
        "batch": config.data.batch_size,
        "image_size": config.data.image_size,
        "precision": measures.learner.precision,
        "processes": mesh.world_size,
        "threads": mesh.threads,
        "turns": {"count": words.rounds, "seconds": words.seconds},
        "images": {"kind": images.kind, "count": len(images.train)},
        "load_average": round(os.getloadavg()[0], 1),
    }


def _keep(record: dict[str, Any], path: Path) -> None:
    try:
        path.write_text(json.dumps(record, indent=1) + "\n")
        report.draw(record, path.with_suffix(".png"))
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror})") from None


def _baseline(words: Namespace, dotted: list[str], folder: Path) -> dict[str, Any]:
    """In turns, each in a process of its own, so that nothing that one sets up helps another: the
    loop and ours end to end; a DataLoader, NVIDIA's DALI example and our engine alone, all of them
    making the crops of that loop."""
    record: dict[str, Any] = {}
    for name, ours, theirs, more in (
        ("training", "trainer", ["example"], []),
        ("loading", "engine", ["dataloader", "dali"][: 1 + dali.available()], CROPS),
    ):
        turns: dict[str, list[float]] = {one: [] for one in (ours, *theirs)}
        with report.busy(f"measuring {name} beside {' and '.join(theirs)}", True):
            for _ in range(words.rounds):
                for one, values in turns.items():
                    values.append(_turn(one, words, dotted + more, folder))
        figures = {one: Figure(tuple(values)) for one, values in turns.items()}
        record[name] = {one: figure.record() for one, figure in figures.items()}
        for one in theirs:
            record[name][f"over_{one}"] = rounded(figures[ours].over(figures[one]))
    return record


def _turn(name: str, words: Namespace, dotted: list[str], folder: Path) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "alexnet_dist.bench", "--turn", name]
    command += ["--seconds", str(words.seconds), "--baseline", str(folder), *dotted]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"the turn of {name} failed ({reason}): {' '.join(command)} shows more")
    return float(done.stdout.split()[-1])


def _plain_turn(words: Namespace, batch: int) -> float:
    """Images a second of one turn of what is compared with, with nothing of ours around it."""
    torch.set_num_threads(available_cpus())
    running = PLAIN[words.turn](Path(words.baseline), batch)
    for _ in range(2 * available_cpus() + 1):  # workers keep two batches each ready
        next(running)
    images, begin = 0, _now()
    while time.perf_counter() - begin < words.seconds or images < 2 * batch:
        images += next(running)
    return images / (_now() - begin)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _folder(words: Namespace, config: Config) -> Path:
    """The folder of JPEGs, class by class, that the plain loop reads."""
    root = words.baseline or config.data.root
    catalogue = scan_dataset(root, config.data.cache_dir, lambda *_: None)
    if catalogue.kind != "folders":
        raise UserError(
            f"{root} holds no folders of images, which the plain loop reads: give --baseline DIR, "
            "the folder that it was made of"
        )
    return Path(catalogue.train.folder)


def _understand(arguments: list[str]) -> tuple[Namespace, list[str]]:
    options = CommandParser(PROGRAM, __doc__)
    options.add_argument(
        "--baseline",
        nargs="?",
        const="",
        metavar="DIR",
        help="measure the usual beside it, on the JPEGs of this folder (data.root)",
    )
    options.add_argument(
        "--each", action="store_true", help="turn off, one at a time, what makes computing faster"
    )
    options.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    options.add_argument("--seconds", type=float, default=3.0, help="of a turn, at least (3)")
    options.add_argument("--out", metavar="FILE.json", help="write the record, and a PNG beside it")
    options.add_argument("--config", help="a YAML file of the trainer's options")
    options.add_argument("--turn", help=SUPPRESS)
    words, dotted = options.understand(arguments)
    for name, least in (("rounds", 1), ("seconds", 0.0)):
        value = getattr(words, name)
        if not value >= least:
            raise UserError(f"--{name} is {value}; it must be at least {least}", on_all_ranks=True)
    if words.out and not Path(words.out).absolute().parent.is_dir():
        raise UserError(f"there is no folder for --out {words.out}: make it", on_all_ranks=True)
    return words, (["--config", words.config] if words.config else []) + dotted


if __name__ == "__main__":
    run_command(main)
