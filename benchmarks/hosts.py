"""Hosts that are network namespaces on this machine (iproute2; as root)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Hosts:
    """Network namespaces on a bridge, each with a link of ``rate``."""

    def __init__(self, count: int, rate: str | None) -> None:
        self.count, self.rate = count, rate

    def __enter__(self) -> "Hosts":
        self.__exit__()
        _ip("link add adbr type bridge")
        _ip("link set adbr up")
        for n in range(self.count):
            _ip(f"netns add adh{n}")
            _ip(f"link add adv{n} type veth peer name eth0 netns adh{n}")
            _ip(f"link set adv{n} master adbr up")
            _ip(f"-n adh{n} addr add 10.91.0.{n + 1}/24 dev eth0")
            _ip(f"-n adh{n} link set eth0 up")
            _ip(f"-n adh{n} link set lo up")
            if self.rate:
                shape = f"root tbf rate {self.rate} burst 1mb latency 100ms".split()
                for side in (["tc", "-n", f"adh{n}"], ["tc"]):
                    device = "eth0" if len(side) > 1 else f"adv{n}"
                    subprocess.run([*side, "qdisc", "add", "dev", device, *shape], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        for n in range(64):
            if Path(f"/run/netns/adh{n}").exists():
                _ip(f"netns delete adh{n}")
            if Path(f"/sys/class/net/adv{n}").exists():  # it goes with its namespace, soon
                subprocess.run(["ip", "link", "delete", f"adv{n}"], stderr=subprocess.DEVNULL)
        if Path("/sys/class/net/adbr").exists():
            _ip("link delete adbr")

    def run(self, module: str, *words: str) -> dict[str, Any]:
        """One group, a process of ``module`` a host; what rank 0 says, in JSON, last."""
        command = [sys.executable, "-W", "ignore", "-m", module, *words]
        running = []
        for n in range(self.count):
            env = os.environ | {
                "RANK": str(n),
                "WORLD_SIZE": str(self.count),
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "10.91.0.1",
                "MASTER_PORT": "29555",
                "GLOO_SOCKET_IFNAME": "eth0",
                "OMP_NUM_THREADS": "1",  # as torchrun sets it; gloo's threads compute, too
                "PYTHONWARNINGS": "ignore",
            }
            host = ["ip", "netns", "exec", f"adh{n}", *command]
            pipe = subprocess.PIPE if n == 0 else subprocess.DEVNULL
            running.append(subprocess.Popen(host, env=env, stdout=pipe, text=True))
        try:
            while all(process.poll() is None for process in running):
                time.sleep(0.2)
            if any(process.poll() for process in running):  # the others would wait for it
                raise SystemExit(f"{' '.join(words)}: a process has failed")
            out, _ = running[0].communicate()
            if any(process.wait() for process in running):
                raise SystemExit(f"{' '.join(words)}: a process has failed")
        finally:
            for process in running:
                process.kill()
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)
