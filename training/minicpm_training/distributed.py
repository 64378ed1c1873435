"""Training by several processes of one machine: ``--nproc N``, or the same command under ``torchrun``.

Every process runs the whole command on its own rows of each update; FSDP2 shards the weights, the gradients and the
optimizer. What depends on a clock, a signal or a file is decided once and told to all (:func:`agree`,
:func:`agree_to_stop`), since processes that do not walk the same way wait for one another for ever. With one process
every function here gives back what it was given and imports nothing of ``torch.distributed``.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from minicpm_edge.cli.command import EXIT_ERROR, EXIT_INTERRUPTED
from minicpm_edge.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minicpm_edge.model.transformer import MiniCPM
    from minicpm_training.recipe.schema import Recipe

GRACE_SECONDS = 5.0  # in which the launcher sees which process failed first

T = TypeVar("T")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of how many processes this one is, and which process started it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: int = 0

    @property
    def is_orphan(self) -> bool:
        return self.size > 1 and os.getppid() != self.launcher


_place = Place()


def rank() -> int:
    return _place.rank


def size() -> int:
    return _place.size


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return _place.rank == 0


def run_joined(command: Callable[[], int]) -> int:
    """A command's exit code; where torch's launcher started this process, it is for that time one of several.

    An error that several meet is told by one: the others hold theirs back for a moment, in which the launcher ends
    them. So do those whose partner died.
    """
    global _place
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return command()
    import torch
    from torch import distributed

    _place = Place(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        launcher=os.getppid(),
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
    code = EXIT_ERROR
    try:
        # Numbers and decisions go by gloo, on the CPU; what a GPU holds goes by NCCL.
        gpus = torch.cuda.is_available() and distributed.is_nccl_available()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        done = command()
        sys.stdout.flush()
        barrier()  # none ends before all are done
        distributed.destroy_process_group()
        code = done
        return code
    except Exception as error:
        if not (is_main() and isinstance(error, UserError)):
            time.sleep(GRACE_SECONDS + rank() / 2)
        raise
    finally:
        _place = Place()
        # The interpreter is not taken down: gloo's threads let go of tensors late, which then would abort the process.
        atexit.register(os._exit, code)


def check(recipe: Recipe, num_processes: int) -> None:
    """Raises :class:`UserError` where a recipe cannot be trained by so many processes of this machine."""
    if num_processes == 1:
        return
    import torch

    for stage in recipe.plan.stages:
        length, sequences = stage.sequence_length, stage.sequences_per_step
        if sequences % num_processes:
            nearest = max(1, round(sequences / num_processes)) * num_processes * length
            raise UserError(
                f"batch_tokens {stage.batch_tokens} are {sequences} sequences of data.sequence_length {length}, which "
                f"{num_processes} processes cannot share evenly: the nearest batch_tokens that they can is {nearest}"
            )
    if recipe.compile:
        raise UserError("compile is for one process: give --set compile=false, or leave --nproc out")
    if recipe.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"device {recipe.device!r} is one device: several processes need 'auto', 'cuda' or 'cpu'"
        )
    num_gpus, num_here = torch.cuda.device_count(), num_processes
    if size() > 1:  # under torchrun, perhaps of several machines
        num_here = int(os.environ["LOCAL_WORLD_SIZE"])
    if recipe.device != "cpu" and 0 < num_gpus < num_here:
        raise UserError(
            f"{num_here} processes need a GPU each and there are {num_gpus}: "
            f"give --nproc {num_gpus}, or --set device=cpu"
        )


def own_device(device: torch.device) -> torch.device:
    """This process's share of the devices of that kind."""
    import torch

    if size() == 1:
        return device
    if device.type != "cuda":
        return torch.device("cpu")  # Apple's GPU is one, and has no collectives
    device = torch.device("cuda", _place.local_rank)
    torch.cuda.set_device(device)
    return device


# Agreeing.


def agree(decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank. The others do not call ``decide``."""
    if size() == 1:
        return decide()
    from torch import distributed

    decided: list[T | None] = [decide() if is_main() else None]
    distributed.broadcast_object_list(decided, src=0)
    return decided[0]  # type: ignore[return-value]


def agree_to_stop(requested: bool) -> bool:
    """Whether any process was asked to stop, or has lost its launcher: then nobody could ask it any more."""
    return requested if size() == 1 else total(int(requested or _place.is_orphan)) > 0


def total(number: Number) -> Number:
    """The sum of every rank's number, in float64."""
    if size() == 1:
        return number
    import torch
    from torch import distributed

    sum_ = torch.tensor(number, dtype=torch.float64)
    distributed.all_reduce(sum_)
    return type(number)(sum_.item())


def collect(value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    if size() == 1:
        return [value]
    from torch import distributed

    values: list[T] = [value] * size()
    distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all are here."""
    total(0)


# Sharding.


def shard(model: MiniCPM, device: torch.device) -> None:
    """Leave each process its share of every parameter; a layer is whole only while it computes.

    Gradients are summed over the processes, as they are over micro-batches.
    """
    if size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    # Kept whole between forward and backward: FSDP gathers again where an output tensor's gradient comes, and a Loss
    # is no tensor.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def reshard(model: MiniCPM) -> None:
    """Free what a forward without a backward left gathered: only then are the model's parameters its shards."""
    if size() > 1:
        model.reshard()  # type: ignore[operator]  # of FSDPModule


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on every rank; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's share of a whole tensor shaped like ``parameter``, on its device; whole where that is."""
    if size() > 1:
        import torch
        from torch.distributed.tensor import DTensor

        if isinstance(parameter, DTensor):
            own = parameter.to_local()
            start = min(len(tensor), rank() * -(-len(tensor) // size()))
            return DTensor.from_local(
                torch.empty_like(own).copy_(tensor[start : start + len(own)]),
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
    return tensor.to(parameter)


def gathered(model: MiniCPM, tensors: Mapping[str, Tensor]) -> tuple[MiniCPM, Mapping[str, Tensor]]:
    """A sharded model and named tensors, whole and on the CPU of rank 0; elsewhere they stay empty."""
    if size() == 1:
        return model, tensors
    import torch
    from torch import nn

    from minicpm_edge.model.transformer import MiniCPM

    def gather(tensor: Tensor) -> Tensor:
        full = whole(tensor.detach())  # one at a time: a GPU has room for that
        return full.cpu() if is_main() else torch.empty(0)

    with torch.device("meta"):
        complete = MiniCPM(model.config)
    for name, parameter in model.named_parameters():
        module, _, key = name.rpartition(".")
        setattr(complete.get_submodule(module), key, nn.Parameter(gather(parameter)))
    return complete, {name: gather(tensor) for name, tensor in tensors.items()}


# Launching.


def launch(words: Sequence[str], num_processes: int) -> int:
    """Run a command line by several processes under torch's launcher; the exit code.

    A signal is handed on to them, and they stop by themselves, with a checkpoint; a second one ends them at once. When
    one of them dies the launcher ends the others.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    debug = "--debug" in words
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool, _quiet_logs(unless=debug):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=f"minicpm-edge-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        start = partial(pool.submit, elastic_launch(config, _work), list(words), os.getpid())
        results, signals = _hand_on_signals(start, num_processes)
        try:
            code: int = max(results.result().values())
            return code
        except ChildFailedError as failed:
            if debug:
                raise
            first, failure = failed.get_first_failure()
            if failure.exitcode > 0:
                return EXIT_ERROR  # the process has said why
            if signals:
                raise KeyboardInterrupt from None
            raise UserError(
                f"process {first} of {num_processes} was killed by {failure.signal_name()}, and the others were ended; "
                "what was saved is good: the run can go on from its last checkpoint, if it has one"
            ) from None


@contextmanager
def _quiet_logs(*, unless: bool) -> Iterator[None]:
    """Without torch's own account of what its launcher does: we say ourselves what failed, in one line."""
    logging.disable(logging.NOTSET if unless else logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _work(words: list[str], launcher: int) -> int:
    """What each process runs: the command itself. Returns its exit code where that is no failure."""
    from minicpm_edge.cli.main import main

    # A launcher's death sends SIGINT, which is to end this process except in training; it may be dead already.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getppid() != launcher:
        sys.exit(EXIT_ERROR)
    code = main(words)
    if code not in (0, EXIT_INTERRUPTED) or os.getppid() != launcher:
        sys.exit(code)
    atexit.register(os._exit, 0)  # to the launcher an interrupted process is one that has done its work
    return code


def _hand_on_signals(start: Callable[[], Future[T]], num_processes: int) -> tuple[Future[T], list[int]]:
    """Start the processes and wait for their end; signals go on to them and into the list returned."""
    received: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for process in active_children():
            if len(received) == 1:
                process.terminate()
            else:
                process.kill()

    # A terminal sends Ctrl-C to all processes; those that start now inherit that they leave it to this one.
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, hand_on),
    }
    try:
        running = start()
        while len(processes := active_children()) < num_processes and not running.done():
            time.sleep(0.01)
        signal.signal(signal.SIGINT, hand_on)
        for process in processes if received else ():
            process.terminate()
        while not running.done():
            wait([running], timeout=0.2)
            if any(process.exitcode for process in processes):
                wait([running], timeout=GRACE_SECONDS / 2)  # torch's launcher asks the others to end
                for process in processes:
                    process.kill()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return running, received
