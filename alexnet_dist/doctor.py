"""Look whether a run would work here, on one machine or on all of a job, and say how to fix it.

python -m alexnet_dist.doctor [--quick] [--json] [--config FILE] [--data.root DIR] ...
torchrun --nproc_per_node=2 -m alexnet_dist.doctor --config FILE ...
sbatch --nodes=2 slurm/doctor.sbatch --config FILE ...

It takes the options of the run, and at most a minute once all processes have begun; --quick about
ten seconds: it reads few images, and writes no checkpoint. Each line of its page is ok, a warning,
or fails; where any fails, the exit code is 1 on every process.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import textwrap
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from alexnet_dist.checks import CHECKS, Check, Context, Finding, remove_probe
from alexnet_dist.config import CommandParser
from alexnet_dist.errors import UserError, run_command
from alexnet_dist.parallel.rendezvous import is_launched

ALONE, TOGETHER, MEET, END = 25.0, 35.0, 60.0, 5.0
"""Seconds for the checks of a process alone, and for those of all together; how long after its own
start a process waits for others; and how much later than its own another's end may come."""

COLORS = {"ok": "", "warning": "yellow", "fails": "red"}

_FORK: Any = multiprocessing.get_context("fork")  # with torch imported; it has not computed yet


class Group:
    """The processes of the run, as far as they come: each tells the others what it has.

    It has a store, but no process group, since that waits for those that do not come.
    """

    def __init__(self) -> None:
        env = os.environ
        self.rank, self.size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        self.local_rank = int(env.get("LOCAL_RANK", 0))
        self.local_size = int(env.get("LOCAL_WORLD_SIZE", 1))
        self._store: Any = None
        if not is_launched():
            return
        self.address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        kept = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = dist.TCPStore(
                env["MASTER_ADDR"],
                int(env["MASTER_PORT"]),
                is_master=self.rank == 0 and not kept,
                wait_for_workers=False,
                timeout=timedelta(seconds=MEET),
            )
        except dist.DistError as error:
            raise UserError(
                f"process {self.rank} (host {socket.gethostname()}) cannot use {self.address} "
                f"({str(error).splitlines()[0]}): start process 0 there, with a port that is free "
                "and that other hosts reach"
            ) from None
        env["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # this process keeps it, for its checks
        self._store = dist.PrefixStore(f"doctor-{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def exchange(
        self, name: str, mine: Any, until: float, ranks: Iterable[int] | None = None
    ) -> dict[int, Any]:
        """What each process, or each of ``ranks``, gives under ``name``, by rank; of those that
        give it ``until`` then."""
        if self._store is None:
            return {0: mine}
        wanted = set(range(self.size) if ranks is None else ranks)
        found: dict[int, Any] = {}
        try:
            self._store.set(f"{name}/{self.rank}", json.dumps(mine))
            while True:
                for rank in wanted - found.keys():
                    if self._store.check([f"{name}/{rank}"]):
                        found[rank] = json.loads(self._store.get(f"{name}/{rank}"))
                if len(found) == len(wanted) or time.monotonic() > until:
                    return found
                time.sleep(0.05)
        except dist.DistError:
            raise UserError(f"process {self.rank} has lost process 0, which prints why") from None


def run_checks(checks: Sequence[Check], here: Context, until: float) -> dict[str, Finding]:
    """What the checks find, one after another, by name; ``until`` then.

    They run in a process of their own. One that hangs or crashes is ended there, and another
    process goes on; but not with those that all processes run together.
    """
    left, found = list(checks), dict[str, Finding]()
    while left:
        receiver, sender = _FORK.Pipe(duplex=False)
        child = _FORK.Process(target=_work, args=(left, here, sender), daemon=True)
        child.start()
        sender.close()
        while left:
            check = left.pop(0)
            finding = _receive(receiver, child, min(check.seconds, until - time.monotonic()))
            if isinstance(finding, str):
                found[check.name] = Finding("fails", finding, check.if_stuck)
                here.failed.add(check.name)
                child.kill()
                break
            if finding is not None:
                found[check.name] = Finding(*finding)
        if left and (left[0].scope == "together" or time.monotonic() > until):
            seen = f"{finding}; what comes after it is not looked at"
            return found | {check.name: Finding("fails", seen, check.if_stuck)}
    return found


def _receive(receiver: Any, child: Any, seconds: float) -> Any:
    """What the child has found, or why there is nothing."""
    if not receiver.poll(max(seconds, 0.1)):
        return f"no answer within {seconds:.0f} s"
    try:
        return receiver.recv()
    except EOFError:
        child.join(5)
        return f"its process has crashed (exit code {child.exitcode})"


def _work(checks: Sequence[Check], here: Context, sender: Any) -> None:
    """Run checks, and send what each has found."""
    with suppress(AttributeError):  # PR_SET_PDEATHSIG: not to outlive a command that is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if "--debug" not in sys.argv:  # libraries' own words would be on the page
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    for check in checks:
        met = check.scope != "together" or "processes" not in here.failed
        try:
            finding = check.run(here) if met else None
        except UserError as error:
            seen, _, fix = str(error).rpartition(": ")
            finding = Finding("fails", seen or fix, fix if seen else "")
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            finding = Finding("fails", f"{type(error).__name__}: {lines[0]}", check.if_stuck)
        if finding is not None and finding.status == "fails":
            here.failed.add(check.name)
        sender.send(finding and tuple(finding))
    os._exit(0)


def merge(check: Check, found: dict[int, Finding], hosts: dict[int, str]) -> list[dict[str, Any]]:
    """The lines of a check, of what each process has found: a single one if all is ok."""
    groups: dict[Finding, list[int]] = {}
    for rank, finding in sorted(found.items()):
        groups.setdefault(finding, []).append(rank)
    if check.same and len(groups) > 1:
        groups = {f._replace(status="fails", fix=check.if_stuck): groups[f] for f in groups}
    bad = [finding for finding in groups if finding.status != "ok"]
    lines = []
    for finding in bad or list(groups)[:1]:
        where = f" ({who(groups[finding], hosts)})" if len(groups) > 1 else ""
        line = {"check": check.name, "status": finding.status, "seen": finding.seen + where}
        lines.append(line | {"fix": finding.fix, "processes": groups[finding]})
    return lines


def who(ranks: Sequence[int], hosts: dict[int, str]) -> str:
    """Processes and their hosts, for people."""
    names = ", ".join(dict.fromkeys(hosts.get(rank, "unknown") for rank in ranks))
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}, host {names}"


def look(here: Context, group: Group, begun: float) -> list[dict[str, Any]]:
    """Run all checks; the lines of the page, on process 0."""
    group.exchange("host", socket.gethostname(), 0)
    scopes = {"all", "hosts" if group.local_rank == 0 else "", "one" if group.rank == 0 else ""}
    found = run_checks([c for c in CHECKS if c.scope in scopes], here, begun + ALONE)
    reports = group.exchange("alone", [str(here.probe), found], begun + MEET)
    hosts = group.exchange("host", socket.gethostname(), 0)
    late = sorted(set(range(group.size)) - reports.keys())
    if 0 in late:
        raise UserError(f"process 0 ({who([0], hosts)}) does not answer: look at that host")
    here.probe = Path(reports[0][0])
    together: dict[int, Any] = {}
    if not late:
        here.failed |= {name for _, f in reports.values() for name in f if f[name][0] == "fails"}
        until = time.monotonic() + TOGETHER
        mine = run_checks([c for c in CHECKS if c.scope == "together"], here, until)
        together = group.exchange("together", mine, until + END)
        late = sorted(set(range(group.size)) - together.keys())
    if late:
        came = who([rank for rank in range(group.size) if rank not in late], hosts)
        seen = f"{who(late, hosts)} did not come, or has gone; {came} did, at {group.address}"
        fix = "start all of the run together; look at that host, or at the one that is not named"
        together[0] = {**together.get(0, {}), "processes": Finding("fails", seen, fix)}
    every = [*((rank, report[1]) for rank, report in reports.items()), *together.items()]
    lines = []
    for check in CHECKS:
        of_check = {rank: Finding(*f[check.name]) for rank, f in every if check.name in f}
        lines += merge(check, of_check, hosts)
    return lines


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print the page, as wide as the terminal; elsewhere a line for each finding."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    width = console.width if console.is_terminal else sys.maxsize
    for line in lines:
        text = f"{line['status']:<8} {line['check']:<12} {line['seen']}"
        text += f": {line['fix']}" if line["fix"] else ""
        text = textwrap.fill(text, width, subsequent_indent=" " * 22, break_on_hyphens=False)
        console.print(text, style=COLORS[line["status"]])


def main(arguments: list[str]) -> None:
    """Look as the command line says."""
    parser = CommandParser("doctor", __doc__)
    parser.add_argument("--quick", action="store_true", help="read few images, in ten seconds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed, begun, group = parser.parse(arguments), time.monotonic(), Group()
    run, args = parsed.config.run, parsed.args
    path = Path(run.output_dir, run.name or parsed.config_name)
    if run.resume not in ("auto", "never"):
        path = Path(run.resume)
    probe = path.parent / f".doctor-{uuid.uuid4().hex[:8]}"
    here = Context(parsed.config, path, probe, args.quick, group.size, group.local_size)
    if group.rank == 0 and not args.json:
        print(f"run {path}, processes: {group.size}, host {socket.gethostname()}", flush=True)
    try:
        lines = look(here, group, begun)
    finally:
        if group.rank == 0:
            clean = Check("clean", remove_probe, "one", "")
            run_checks([clean], here, time.monotonic() + 2)
    fails, warnings = (sum(line["status"] == s for line in lines) for s in ("fails", "warning"))
    if group.rank == 0:
        if args.json:
            print(json.dumps({"fails": fails, "warnings": warnings, "lines": lines}, indent=1))
        else:
            show(lines)
            print(f"fails: {fails}, warnings: {warnings}; {time.monotonic() - begun:.0f} s")
        sys.stdout.flush()
    fails = group.exchange("fails", fails, time.monotonic() + 2 * END, [0]).get(0, 1)
    # process 0 keeps the store until they know
    group.exchange("end", 0, time.monotonic() + END, None if group.rank == 0 else [])
    if fails:
        raise UserError("something fails: the page says what, and its fix", on_all_ranks=True)


if __name__ == "__main__":
    run_command(main)
