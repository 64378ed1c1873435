"""The process group: rank, world size and the collectives that training needs, over ``torch.distributed``.

Every rank runs the whole job on its own sequences of each step. What depends on a clock, a signal or a file is decided
on rank 0 and broadcast, since ranks that diverge deadlock at the next collective. With one process every function here
gives back what it was given, and nothing of ``torch.distributed`` is imported.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from minicpm_edge.errors import UserError

if TYPE_CHECKING:
    import torch

GRACE_SECONDS = 5.0  # in which the launcher sees which process failed first

T = TypeVar("T")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """This process's place in the group, and the process that launched it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher_pid: int = 0

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher has died: then nobody could stop this process any more."""
        return self.world_size > 1 and os.getppid() != self.launcher_pid


_rank_info = RankInfo()


def rank() -> int:
    return _rank_info.rank


def world_size() -> int:
    return _rank_info.world_size


def is_rank0() -> bool:
    """Rank 0 writes the files and prints."""
    return _rank_info.rank == 0


def with_process_group(run: Callable[[], int]) -> int:
    """Run something and return its exit code; within a group, where torch's launcher started this process.

    An error that several ranks meet is printed by one: the others hold theirs back for a moment, in which the launcher
    ends them. So do those whose partner died.
    """
    global _rank_info
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return run()
    import torch
    from torch import distributed

    _rank_info = RankInfo(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        launcher_pid=os.getppid(),
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
    code = 1
    try:
        # Numbers and decisions go by gloo, on the CPU; what a GPU holds goes by NCCL.
        gpus = torch.cuda.is_available() and distributed.is_nccl_available()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        done = run()
        sys.stdout.flush()
        barrier()  # none ends before all are done
        distributed.destroy_process_group()
        code = done
        return code
    except Exception as error:
        if not (is_rank0() and isinstance(error, UserError)):
            time.sleep(GRACE_SECONDS + rank() / 2)
        raise
    finally:
        _rank_info = RankInfo()
        # The interpreter is not taken down: gloo's threads let go of tensors late, which then would abort the process.
        atexit.register(os._exit, code)


def local_device(device: torch.device) -> torch.device:
    """This rank's own device of that kind."""
    import torch

    if world_size() == 1:
        return device
    if device.type != "cuda":
        return torch.device("cpu")  # Apple's GPU is one, and has no collectives
    device = torch.device("cuda", _rank_info.local_rank)
    torch.cuda.set_device(device)
    return device


def broadcast_from_rank0(decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank. The others do not call ``decide``."""
    if world_size() == 1:
        return decide()
    from torch import distributed

    decided: list[T | None] = [decide() if is_rank0() else None]
    distributed.broadcast_object_list(decided, src=0)
    return decided[0]  # type: ignore[return-value]


def any_rank_stops(requested: bool) -> bool:
    """Whether any rank was asked to stop, or has lost its launcher."""
    return requested if world_size() == 1 else all_reduce_sum(int(requested or _rank_info.is_orphan)) > 0


def all_reduce_sum(number: Number) -> Number:
    """The sum of every rank's number, in float64."""
    if world_size() == 1:
        return number
    import torch
    from torch import distributed

    sum_ = torch.tensor(number, dtype=torch.float64)
    distributed.all_reduce(sum_)
    return type(number)(sum_.item())


def all_gather_object(value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    values: list[T] = [value] * world_size()
    distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all are here."""
    all_reduce_sum(0)
