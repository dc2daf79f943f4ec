"""One stream of events: the run folder's metrics.jsonl is the truth, all else reads along."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

from alexnet_dist.errors import Failure

Event = dict[str, Any]


class Sink(Protocol):
    """Something that takes events."""

    def take(self, event: Event) -> None: ...

    def close(self, patience: float | None = None) -> None: ...


class Stream:
    """Hands each event to all sinks, in order; ranks but the first have none."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = list(sinks)

    def emit(self, event: str, **values: Any) -> None:
        record = {"event": event, "time": round(time.time(), 3), **values}
        for sink in self.sinks:
            sink.take(record)

    def close(self, patience: float | None = None) -> None:
        for sink in self.sinks:
            sink.close(patience)


class JsonLines:
    """A line for each event, flushed. A full disk costs records, not the run."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a")
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # the last line of a life that was cut off

    def take(self, event: Event) -> None:
        with contextlib.suppress(OSError):
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()

    def close(self, patience: float | None = None) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def read(path: Path) -> list[Event]:
    """The events of a metrics.jsonl, lines that were cut off left out."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        raise Failure(f"there are no records at {path}: give a run's folder") from None
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def surviving(events: list[Event]) -> list[Event]:
    """The events that count: where a run went back to a checkpoint, those behind it are void."""
    kept: list[Event] = []
    for event in events:
        if event["event"] == "start":  # a life that ended before its first checkpoint
            kept = []
        elif event["event"] in ("resume", "rollback"):
            last = event["to" if event["event"] == "rollback" else "step"]
            kept = [old for old in kept if old.get("step", 0) <= last]
        kept.append(event)
    return kept
