"""A rendezvous store that only the processes of one restart share.

torchrun's agent keeps one store for all restarts of a group. Keys that an earlier group has written
(addresses of processes that are gone) would be read by the next one, which then fails to connect
(pytorch issue 135712; seen with torch 2.14 and gloo). So each group first agrees on a nonce, and
prefixes all of its keys with it.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from alexnet_dist.errors import UserError

_RENDEZVOUS_SECONDS = 300
_POLL_SECONDS = 0.02


def isolated_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """The store of this group; None where there is no agent that keeps one over restarts.

    Raises:
        UserError: the other processes did not come.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    nonce = _publish_nonce(store, world_size) if rank == 0 else _wait_for_nonce(store, rank)
    return dist.PrefixStore(f"group-{nonce}", store)


def _publish_nonce(store: dist.Store, world_size: int) -> str:
    """Rank 0: choose the nonce, and acknowledge every process that has read it."""
    nonce = uuid.uuid4().hex
    store.set("nonce", nonce)
    missing = set(range(1, world_size))
    deadline = time.monotonic() + _RENDEZVOUS_SECONDS
    while missing:
        for rank in sorted(missing):
            if store.check([f"hello-{nonce}-{rank}"]):
                store.set(f"ack-{nonce}-{rank}", store.get(f"hello-{nonce}-{rank}").decode())
                missing.remove(rank)
        _poll(deadline, f"processes {', '.join(map(str, sorted(missing)))} did")
    return nonce


def _wait_for_nonce(store: dist.Store, rank: int) -> str:
    """Other ranks: read the nonce. One that an earlier group left behind is never acknowledged."""
    me = uuid.uuid4().hex
    deadline = time.monotonic() + _RENDEZVOUS_SECONDS
    greeted = ""
    while True:
        if store.check(["nonce"]):
            nonce = store.get("nonce").decode()
            if nonce != greeted:
                store.set(f"hello-{nonce}-{rank}", me)
                greeted = nonce
            ack = f"ack-{nonce}-{rank}"
            if store.check([ack]) and store.get(ack).decode() == me:
                return nonce
        _poll(deadline, "process 0 did")


def _poll(deadline: float, who: str) -> None:
    if time.monotonic() > deadline:
        raise UserError(
            f"{who} not come within {_RENDEZVOUS_SECONDS} s: start all machines of the run together"
        )
    time.sleep(_POLL_SECONDS)
