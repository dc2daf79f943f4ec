"""Send a run's records to Weights & Biases, as one run however often it was restarted.

python -m alexnet_dist.replay RUN [--wandb online|offline|auto] [--project P] [--name N] [--id ID]
"""

import shlex
import uuid
from pathlib import Path

from alexnet_dist.config import CommandParser
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.tracking import Event
from alexnet_dist.tracking.logger import read_events
from alexnet_dist.tracking.run_dir import read_config
from alexnet_dist.tracking.wandb import init_run, log_event, resolve_mode


def main(arguments: list[str]) -> None:
    """Replay as the command line says."""
    parser = CommandParser("replay", __doc__, trainer_options=False)
    add = parser.add_argument
    add("run", help="a run's folder", type=Path)
    add("--wandb", choices=("auto", "online", "offline"), default="auto")
    add("--project", help="the project in W&B; the run's own unless given")
    add("--name", help="the name in W&B; that of the run's folder unless given")
    add("--id", help="the id in W&B, which must be new there", default=uuid.uuid4().hex[:8])
    args = parser.parse(arguments).args
    config, events = read_config(args.run), select_events(args.run)
    mode = resolve_mode(args.wandb)
    if mode not in ("online", "offline"):
        raise UserError(f"WANDB_MODE is {mode} here: give --wandb online, or --wandb offline")
    folder = args.run / "replay"
    folder.mkdir(exist_ok=True)
    try:
        run = init_run(
            folder,
            args.id,
            mode=mode,
            config=config,
            name=args.name or args.run.resolve().name,
            project=args.project or config.get("wandb", {}).get("project"),
            resume="never",  # appended to another replay, every step would be there twice
        )
        where = run.url or f"wandb sync {shlex.quote(str(Path(run.dir).parent))}"
        for event in events:
            log_event(run, event)
        run.finish()
    except Exception as error:
        fix = "give --wandb offline" if mode == "online" else "fix that, and replay again"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"Weights & Biases failed ({reason}): {fix}") from None
    kinds = [event["event"] for event in events]
    print(
        f"{kinds.count('train')} train events, {kinds.count('eval')} evaluations and "
        f"{kinds.count('image')} images of {args.run}, as W&B run {args.id}:\n{where}"
    )


def select_events(folder: Path) -> list[Event]:
    """The events of a run that were not superseded, and of each image only the last.

    Raises:
        UserError: there are no records, or none of training.
    """
    events = read_events(folder)
    if not any(event["event"] in ("train", "eval") for event in events):
        raise UserError(f"the records of {folder} have no step of training yet")
    last = {event["name"]: event for event in events if event["event"] == "image"}
    selected = []
    for event in events:
        if event["event"] == "image":
            file = folder / Path(event["path"]).name  # a run's folder may have been moved
            if event is not last[event["name"]] or not file.is_file():
                continue
            event = event | {"path": str(file)}
        selected.append(event)
    return selected


if __name__ == "__main__":
    run_command(main)
