"""Hosts that are network namespaces on this machine (iproute2; as root)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Hosts:
    """Network namespaces on a bridge, each with a link of ``rate`` (as tc has it; None: as fast as
    it goes); a context manager."""

    def __init__(self, count: int, rate: str | None) -> None:
        self.count, self.rate = count, rate

    def __enter__(self) -> "Hosts":
        self.__exit__()
        _run("ip link add adbr type bridge")
        _run("ip link set adbr up")
        for n in range(self.count):
            _run(f"ip netns add adh{n}")
            _run(f"ip link add adv{n} type veth peer name eth0 netns adh{n}")
            _run(f"ip link set adv{n} master adbr up")
            _run(f"ip -n adh{n} addr add 10.91.0.{n + 1}/24 dev eth0")
            _run(f"ip -n adh{n} link set eth0 up")
            _run(f"ip -n adh{n} link set lo up")
            if self.rate:
                shape = f"root tbf rate {self.rate} burst 1mb latency 100ms"
                _run(f"tc -n adh{n} qdisc add dev eth0 {shape}")
                _run(f"tc qdisc add dev adv{n} {shape}")
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in Path("/run/netns").glob("adh*"):
            _run(f"ip netns delete {namespace.name}")
        for link in (*Path("/sys/class/net").glob("adv[0-9]*"), Path("adbr")):
            # a veth goes with its namespace, but not at once
            subprocess.run(["ip", "link", "delete", link.name], stderr=subprocess.DEVNULL)

    def run(self, module: str, *words: str) -> dict[str, Any]:
        """One process group, with a process of ``module`` per host.

        Returns:
            The JSON in the last line that rank 0 prints.
        """
        group = {"WORLD_SIZE": str(self.count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        group |= {"MASTER_ADDR": "10.91.0.1", "MASTER_PORT": "29555", "GLOO_SOCKET_IFNAME": "eth0"}
        group |= {"OMP_NUM_THREADS": "1"}  # as torchrun sets it; gloo's threads compute, too
        command = [sys.executable, "-W", "ignore", "-m", module, *words]
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"adh{n}", *command],
                env=os.environ | group | {"RANK": str(n)},
                stdout=subprocess.PIPE if n == 0 else subprocess.DEVNULL,
                text=True,
            )
            for n in range(self.count)
        ]
        try:
            codes: list[int | None] = [None]
            while None in codes and not any(codes):  # one that failed is waited for by the others
                time.sleep(0.2)
                codes = [rank.poll() for rank in ranks]
            if any(codes):
                raise SystemExit(f"{' '.join(command)}: a process has failed")
        finally:
            for rank in ranks:
                rank.kill()
        answer: dict[str, Any] = json.loads(ranks[0].communicate()[0].splitlines()[-1])
        return answer


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True)
