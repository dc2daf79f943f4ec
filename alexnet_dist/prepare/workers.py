"""Worker processes."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from alexnet_dist.errors import UserError
from alexnet_dist.prepare.shards import ShardJob


def run_jobs(
    num_workers: int, function: Callable[[ShardJob], None], jobs: list[ShardJob]
) -> Iterator[ShardJob]:
    """Have processes call ``function`` for all jobs; the jobs, as they are done.

    Raises:
        Exception: the first that a job raised, once the jobs that are running have finished.
        UserError: a worker was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alexnet_dist.prepare.shards"])  # torch is imported once
    with ProcessPoolExecutor(num_workers, context, _init_worker) as pool:
        futures = {pool.submit(function, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory: the same command "
                "resumes, with fewer --workers if need be"
            ) from None
        except KeyboardInterrupt:
            print("interrupted; the same command resumes", file=sys.stderr, flush=True)
            os._exit(130)  # and the workers follow
        finally:
            pool.shutdown(cancel_futures=True)


def _init_worker() -> None:
    """One thread, deaf to Ctrl-C, and gone when the command is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg prints something on every odd file
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
