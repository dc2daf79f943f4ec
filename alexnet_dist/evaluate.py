"""Exact top-1 and top-5 error of a checkpoint on the validation images, on any number of processes.

python -m alexnet_dist.evaluate --checkpoint RUN [--data.root DIR]
The last line is JSON: top1_error and top5_error in percent, loss, images.
"""

import json
from typing import Any

from alexnet_dist.config import Config, parse, take_option
from alexnet_dist.data import build_engine
from alexnet_dist.data.augment import pixels_for
from alexnet_dist.data.plan import EvaluationPlan
from alexnet_dist.data.sources import make_catalogue, open_sources
from alexnet_dist.data.statistics import Statistics
from alexnet_dist.errors import Failure, run_command
from alexnet_dist.model import VARIANTS, outline
from alexnet_dist.parallel.arithmetic import choose_precision, set_arithmetic
from alexnet_dist.parallel.ddp import DataParallel
from alexnet_dist.parallel.mesh import Mesh, start
from alexnet_dist.tracking.console import IndexProgress
from alexnet_dist.training import checkpoint
from alexnet_dist.training.loop import check_count, evaluate


def main(arguments: list[str]) -> None:
    """Evaluate as the command line says."""
    path, rest = take_option(arguments, "checkpoint")
    if path is None and not {"-h", "--help"} & set(rest):
        raise Failure(
            "there is nothing to evaluate: give --checkpoint a run's folder (its best checkpoint "
            "is taken), or one of its checkpoints",
            everywhere=True,
        )
    try:
        found = checkpoint.find(path) if path else None
        state = checkpoint.read_state(found) if found else {"config": None}
    except Failure as failure:
        raise Failure(str(failure), everywhere=True) from None
    parsed = parse(
        rest,
        program="python -m alexnet_dist.evaluate",
        description=__doc__,
        default=None,
        underneath=state["config"],
    )
    mesh = start(parsed.config.runtime.device, parsed.config.runtime.threads)
    result = evaluate_checkpoint(parsed.config, mesh, str(found), state)
    if mesh.rank == 0:
        print(json.dumps(result), flush=True)


def evaluate_checkpoint(
    config: Config, mesh: Mesh, path: str, state: dict[str, Any]
) -> dict[str, float]:
    """Errors of the checkpoint at ``path`` with its ``state``, on the images of ``config``."""
    data, variant = config.data, config.model.variant
    catalogue = mesh.from_first(lambda: make_catalogue(data.root, data.cache, IndexProgress()))
    if catalogue.val.classes != state["classes"]:
        raise Failure(
            f"the classes of {catalogue.val.folder} are not those that {path} was trained on: "
            "give --data.root a folder with the same class folders",
            everywhere=True,
        )
    fraction = data.image_size / data.resize
    plan = EvaluationPlan(catalogue.val.sizes, data.eval_batch_size, fraction)
    engine = build_engine(
        data.engine,
        open_sources(catalogue)[1],
        pixels_for(
            VARIANTS[variant].pixels,
            Statistics.from_json(state["statistics"]),
            side=data.image_size,
        ),
        plan=None,
        fraction=fraction,
        max_batch=max(mesh.local_batch(data.eval_batch_size), 1),
        device=mesh.device,
        decoder=data.decoder,
        threads=data.threads or mesh.threads,
        ahead=data.ahead,
        policy="omit" if data.on_bad_image == "skip" else "stop",
    )
    model = outline(
        variant,
        num_classes=config.model.num_classes or len(state["classes"]),
        dropout=config.model.dropout,
        image_size=data.image_size,
    )
    precision = choose_precision(config.runtime.precision, mesh.device)
    set_arithmetic(precision, config.runtime.deterministic)
    layout = DataParallel(model, mesh, batch=data.eval_batch_size, precision=precision)
    parameters = {f"model.{name}": p.detach() for name, p in layout.parameters.items()}
    checkpoint.load(checkpoint.find(path), parameters)
    result = evaluate(layout, engine.batches(plan.draws(mesh.rows)), mesh.device)
    left_out = sum(len(news) for news in mesh.gather(engine.bad.take_news()))
    check_count(result, left_out, len(catalogue.val))
    engine.close()
    return result | ({"left_out": left_out} if left_out else {})


if __name__ == "__main__":
    run_command(main)
