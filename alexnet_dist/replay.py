"""Show a run's records in Weights & Biases, as one run whatever its lives were.

python -m alexnet_dist.replay RUN [--wandb online|offline|auto] [--project P] [--name N] [--id ID]
What counts is what survived: where a run went back to a checkpoint, what lay behind it is left out.
"""

import uuid
from pathlib import Path
from typing import Any

from alexnet_dist.config import CommandParser
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.tracking import Event
from alexnet_dist.tracking.logger import drop_superseded, read_events
from alexnet_dist.tracking.run_dir import read_config
from alexnet_dist.tracking.wandb import init_run, log_event, resolve_mode


def main(arguments: list[str]) -> None:
    """Replay as the command line says."""
    parser = CommandParser("replay", __doc__, trainer_options=False)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--wandb", choices=("auto", "online", "offline"), default="auto")
    parser.add_argument("--project", help="the project in W&B; the run's own")
    parser.add_argument("--name", help="the name in W&B; that of the run's folder")
    parser.add_argument("--id", help="the id in W&B, which must be new there; one is drawn")
    words = parser.parse(arguments).args
    folder = Path(words.run)
    events = shown(folder)
    config = read_config(folder)
    mode = resolve_mode(words.wandb)
    if mode not in ("online", "offline"):
        raise UserError(f"WANDB_MODE is {mode} here: give --wandb online, or --wandb offline")
    options = {
        "mode": mode,
        "run_id": words.id or uuid.uuid4().hex[:8],
        "config": config,
        "name": words.name or folder.resolve().name,
        "project": words.project or config.get("wandb", {}).get("project"),
        "resume": "never",  # appended to another replay, every step would be there twice
    }
    try:
        where = _send(events, folder / "replay", options)
    except Exception as error:
        mend = "give --wandb offline" if mode == "online" else "see to it, and replay anew"
        reason = " ".join(str(error).split())
        raise UserError(
            f"Weights & Biases failed ({type(error).__name__}: {reason}): {mend}"
        ) from None
    print(f"{counts(events)} of {folder}, as W&B run {options['run_id']}:\n{where}", flush=True)


def shown(folder: Path) -> list[Event]:
    """The events of a run that a replay shows: those that survived, and of each picture the last.

    Raises:
        Failure: there are no records, or none of training.
    """
    events = drop_superseded(read_events(folder / "metrics.jsonl"))
    if not any(event["event"] in ("train", "eval") for event in events):
        raise UserError(
            f"the records of {folder} have no step of training yet: give a run that has taken some"
        )
    last = {event["name"]: event for event in events if event["event"] == "image"}
    kept = []
    for event in events:
        if event["event"] == "image":
            file = folder / Path(event["path"]).name  # a run's folder may have been moved
            if event is not last[event["name"]] or not file.is_file():
                continue
            event = event | {"path": str(file)}
        kept.append(event)
    return kept


def counts(events: list[Event]) -> str:
    """What was sent, in words."""
    steps = [event["step"] for event in events if event["event"] == "train"]
    evaluations, pictures = (
        sum(event["event"] == kind for event in events) for kind in ("eval", "image")
    )
    return (
        f"{len(steps)} records of training up to step {max(steps, default=0)}, "
        f"{evaluations} evaluations and {pictures} pictures"
    )


def _send(events: list[Event], folder: Path, options: dict[str, Any]) -> str:
    """Send them; where they are then, for people."""
    folder.mkdir(exist_ok=True)
    run = init_run(folder, **options)
    where = f"wandb sync {Path(run.dir).parent}" if run.url is None else str(run.url)
    for event in events:
        log_event(run, event)
    run.finish()
    return where


if __name__ == "__main__":
    run_command(main)
