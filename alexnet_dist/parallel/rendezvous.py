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


def isolated_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """The store of this group; None where there is no agent that keeps one over restarts.

    Raises:
        UserError: other processes did not come.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
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
        raise UserError(
            f"process {missing} did not come within {_RENDEZVOUS_SECONDS} s: start all machines of "
            "the run together"
        )
    time.sleep(0.02)
