"""One stream of events: the run folder's metrics.jsonl is the truth, all else reads along."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

from alexnet_dist.errors import UserError

Event = dict[str, Any]


class LogSink(Protocol):
    """Something that takes events."""

    def take(self, event: Event) -> None: ...

    def close(self, patience: float | None = None) -> None: ...


class EventLog:
    """Hands each event to all sinks, in order; ranks but the first have none."""

    def __init__(self, *sinks: LogSink) -> None:
        self.sinks = list(sinks)

    def emit(self, event: str, **values: Any) -> None:
        record = {"event": event, "time": round(time.time(), 3), **values}
        for sink in self.sinks:
            sink.take(record)

    def close(self, patience: float | None = None) -> None:
        for sink in self.sinks:
            sink.close(patience)


class JsonLines:
    """A line for each event, written at once; what a full disk does not take waits for room."""

    def __init__(self, path: Path) -> None:
        cut = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b"\n" if cut else b""  # the last line of a life that was cut off

    def take(self, event: Event) -> None:
        self._waiting += json.dumps(event).encode() + b"\n"
        with contextlib.suppress(OSError):
            while self._waiting:
                written = os.write(self._file, self._waiting)
                self._waiting = self._waiting[written:]

    def close(self, patience: float | None = None) -> None:
        os.close(self._file)


def read(path: Path) -> list[Event]:
    """The events of a metrics.jsonl, lines that were cut off left out."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        raise UserError(f"there are no records at {path}: give a run's folder") from None
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
