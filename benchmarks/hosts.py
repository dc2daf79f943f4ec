"""Hosts that are network namespaces on this machine (iproute2 and util-linux; as root)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

Process = subprocess.Popen[Any]
HOST = "ALEXNET_DIST_HOST"  # in the environment of all that runs on a host: its namespace


class Hosts:
    """Network namespaces on a bridge, each with a name and an address of its own and a link of
    ``rate`` (as tc has it; None: as fast as it goes); a context manager."""

    def __init__(self, count: int, rate: str | None = None) -> None:
        self.count, self.rate, self.bridge = count, rate, f"ad{os.getpid()}"

    def __enter__(self) -> "Hosts":
        call(f"ip link add {self.bridge} type bridge")
        call(f"ip link set {self.bridge} up")
        for n in range(self.count):
            name, link = f"{self.bridge}h{n}", f"{self.bridge}v{n}"
            call(f"ip netns add {name}")
            call(f"ip link add {link} type veth peer name eth0 netns {name}")
            call(f"ip link set {link} master {self.bridge} up")
            call(f"ip -n {name} addr add {self.address(n)}/24 dev eth0")
            call(f"ip -n {name} link set eth0 up")
            call(f"ip -n {name} link set lo up")
            if self.rate:
                self.limit(n, self.rate)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for n in range(self.count):
            call(f"ip netns delete {self.bridge}h{n}")  # its link goes with it
        call(f"ip link delete {self.bridge}")

    def address(self, n: int) -> str:
        return f"10.91.0.{n + 1}"

    def set_link(self, n: int, state: str) -> None:
        call(f"ip link set {self.bridge}v{n} {state}")  # up or down

    def limit(self, n: int, rate: str) -> None:
        """The speed of a link, in both directions."""
        shape = f"tbf rate {rate} burst 1mb latency 100ms"
        call(f"tc -n {self.bridge}h{n} qdisc replace dev eth0 root {shape}")
        call(f"tc qdisc replace dev {self.bridge}v{n} root {shape}")

    def drop(self, n: int, share: float) -> None:
        """The share of packets to a host that are lost, chosen by chance (iptables)."""
        tables = f"ip netns exec {self.bridge}h{n} iptables"
        call(f"{tables} -F INPUT")
        if share:
            match = "-m statistic --mode random --probability"
            call(f"{tables} -A INPUT -i eth0 {match} {share} -j DROP")

    def start(self, n: int, command: list[str], env: dict[str, str], **popen: Any) -> Process:
        """A command on host ``n``, whose name there is host0, host1, ..."""
        name = f"{self.bridge}h{n}"
        inside = 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts"]
        return subprocess.Popen(
            [*enter, "sh", "-c", inside, f"host{n}", *command],
            env=env | {HOST: name, "GLOO_SOCKET_IFNAME": "eth0"},
            **popen,
        )

    def processes(self, n: int | None = None, word: bytes = b"") -> list[int]:
        """What runs on host ``n``, or on all, and has ``word`` in its command line."""
        found, mark = [], f"{HOST}={self.bridge}h" + ("" if n is None else f"{n}\0")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                ours = mark.encode() in (process / "environ").read_bytes()
                if ours and word in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return found

    def kill(self, n: int | None = None) -> None:
        """All that runs on host ``n``, or on all, at once."""
        for pid in self.processes(n):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, module: str, *words: str) -> dict[str, Any]:
        """One process group, a process of ``module`` on each host; the JSON that rank 0 prints
        last."""
        env = os.environ | {
            "WORLD_SIZE": str(self.count),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
        }
        env |= {"MASTER_ADDR": self.address(0), "MASTER_PORT": "29555"}
        env |= {"OMP_NUM_THREADS": "1"}  # as torchrun sets it; gloo's threads compute, too
        command, ranks = [sys.executable, "-W", "ignore", "-m", module, *words], []
        for n in range(self.count):
            out = subprocess.DEVNULL if n else subprocess.PIPE
            ranks.append(self.start(n, command, env | {"RANK": str(n)}, stdout=out, text=True))
        try:
            codes: list[int | None] = [None]
            while None in codes and not any(codes):  # one that failed is waited for by the others
                time.sleep(0.2)
                codes = [rank.poll() for rank in ranks]
            if any(codes):
                raise SystemExit(f"{' '.join(command)}: a process has failed")
        finally:
            self.kill()
        return dict(json.loads(ranks[0].communicate()[0].splitlines()[-1]))


def call(command: str) -> None:
    """Run a program, which must not fail."""
    subprocess.run(command.split(), check=True)
