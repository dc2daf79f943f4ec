"""Where the processes of a run meet: what launchers tell each, and the store that they share.

torchrun's agent keeps one store for all restarts of a group. Keys that an earlier group has written
(addresses of processes that are gone) would be read by the next one, which then fails to connect
(pytorch issue 135712; seen with torch 2.14 and gloo). So each group first agrees on a nonce, and
prefixes all of its keys with it.
"""

import os
import time
import uuid
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from alexnet_dist.errors import UserError

_RENDEZVOUS_SECONDS = 300
_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun"}


def is_launched() -> bool:
    """Whether torchrun, or another launcher that sets the same variables, started this process.

    Raises:
        UserError: some of the variables are missing or wrong, or there are copies of this process
            that know nothing of each other.
    """
    env, names = os.environ, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in env and "WORLD_SIZE" not in env:
        for name, launcher in _LAUNCHERS.items():
            if int(env.get(name, 1)) > 1:
                raise UserError(
                    f"{launcher} started {env[name]} copies of this command, which know nothing of "
                    "each other: let it start one torchrun on each machine, as python -m "
                    "alexnet_dist.submit does, and torchrun the processes there"
                )
        return False
    set_here = ", ".join(f"{name}={env[name]}" for name in names if env.get(name)) or "nothing"
    numbers = [env.get(name, "") for name in names if name != "MASTER_ADDR"]
    if not env.get("MASTER_ADDR") or not all(map(str.isdecimal, numbers)):
        problem = f"of {', '.join(names)} the environment has only {set_here}"
    elif int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        problem = f"there is no such process: the environment has {set_here}"
    else:
        return True
    raise UserError(f"{problem}: start this command by torchrun, or unset them to train alone")


def open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store of this group, whose waits take up to ``timeout``.

    Raises:
        UserError: other processes did not come.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0 and not agent_keeps_it,
            timeout=timedelta(seconds=_RENDEZVOUS_SECONDS),
            multi_tenant=True,
        )
    except dist.DistError as error:
        _refuse_missing(f"not all {world_size} processes met at {address}:{port}", error)
    store.set_timeout(timeout)
    if not agent_keeps_it:
        return store
    deadline = time.monotonic() + _RENDEZVOUS_SECONDS
    nonce = _publish(store, world_size, deadline) if rank == 0 else _find(store, rank, deadline)
    return dist.PrefixStore(f"group-{nonce}", store)


def _publish(store: dist.Store, world_size: int, deadline: float) -> str:
    """Rank 0: choose the nonce, and acknowledge every process that has read it."""
    nonce = uuid.uuid4().hex
    store.set("nonce", nonce)
    for rank in range(1, world_size):
        while not store.check([f"hello-{nonce}-{rank}"]):
            _sleep_until(deadline, rank)
        store.set(f"ack-{nonce}-{store.get(f'hello-{nonce}-{rank}').decode()}", "")
    return nonce


def _find(store: dist.Store, rank: int, deadline: float) -> str:
    """Other ranks: read the nonce. One that an earlier group left behind is never acknowledged."""
    me = uuid.uuid4().hex
    while True:
        if store.check(["nonce"]):
            nonce = store.get("nonce").decode()
            store.set(f"hello-{nonce}-{rank}", me)
            if store.check([f"ack-{nonce}-{me}"]):
                return nonce
        _sleep_until(deadline, 0)


def _sleep_until(deadline: float, missing: int) -> None:
    if time.monotonic() > deadline:
        _refuse_missing(f"process {missing} did not come")
    time.sleep(0.02)


def _refuse_missing(problem: str, error: Exception | None = None) -> NoReturn:
    reason = f" ({str(error).splitlines()[0]})" if error else ""
    raise UserError(
        f"{problem} within {_RENDEZVOUS_SECONDS} s{reason}: start all machines of the run "
        "together, with one address and a port that is free there"
    ) from None
