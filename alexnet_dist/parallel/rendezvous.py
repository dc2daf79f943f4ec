"""Where the processes of one start of a run meet.

torchrun's agent keeps one store for all the restarts of a group. What an earlier group has written
there (addresses of processes that are gone) would be read by the next one, which then fails to
connect (pytorch issue 135712; seen with torch 2.14 and gloo). So each group agrees on a word of its
own first, and puts it before all of its keys.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from alexnet_dist.errors import UserError

_MEET_SECONDS = 300
_POLL_SECONDS = 0.02


def own_store(rank: int, world: int, timeout: timedelta) -> dist.Store | None:
    """A store that only this group knows; None where no agent keeps one over restarts.

    Raises:
        Failure: the others did not come.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
    word = _invite(store, world) if rank == 0 else _accept(store, rank)
    return dist.PrefixStore(f"group-{word}", store)


def _invite(store: dist.Store, world: int) -> str:
    """Choose the word, and welcome everybody who has heard it."""
    word = uuid.uuid4().hex
    store.set("word", word)
    waiting = set(range(1, world))
    until = time.monotonic() + _MEET_SECONDS
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"hello-{word}-{rank}"]):
                store.set(f"welcome-{word}-{rank}", store.get(f"hello-{word}-{rank}").decode())
                waiting.remove(rank)
        _wait(until, f"processes {', '.join(map(str, sorted(waiting)))} did")
    return word


def _accept(store: dist.Store, rank: int) -> str:
    """Hear the word. One that an earlier group has left behind brings no welcome."""
    me = uuid.uuid4().hex
    until = time.monotonic() + _MEET_SECONDS
    said = ""
    while True:
        if store.check(["word"]):
            word = store.get("word").decode()
            if word != said:
                store.set(f"hello-{word}-{rank}", me)
                said = word
            answer = f"welcome-{word}-{rank}"
            if store.check([answer]) and store.get(answer).decode() == me:
                return word
        _wait(until, "process 0 did")


def _wait(until: float, who: str) -> None:
    if time.monotonic() > until:
        raise UserError(
            f"{who} not come within {_MEET_SECONDS} s: start all machines of the run together"
        )
    time.sleep(_POLL_SECONDS)
