"""A Triton driver for a Hopper card that is not there: kernels compile as on a card and run in the emulator.

`use(mode)` makes it Triton's active driver. Launches then take CPU tensors; everything before the launch (binding,
specialisation, compilation, caching, tensor descriptors) is Triton's own code.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.runtime.cache import get_cache_manager

from ptx_emulator.code import Code
from ptx_emulator.emulator import Mode, launch
from ptx_emulator.errors import PtxError
from ptx_emulator.memory.spaces import SHARED_LIMIT
from ptx_emulator.memory.tensor_map import TensorMap
from ptx_emulator.parser import parse

_REGISTERS_OF_MULTIPROCESSOR = 65_536
NUM_MULTIPROCESSORS = 132


@functools.lru_cache(maxsize=256)
def _code(ptx: str) -> Code:
    return Code(parse(ptx))


class Utils:
    """What Triton asks of the CUDA driver."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_LIMIT,
            "max_num_regs": _REGISTERS_OF_MULTIPROCESSOR,
            "multiprocessor_count": NUM_MULTIPROCESSORS,
            "warpSize": 32,
        }

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def fill_tma_descriptor(self, address: int, swizzle: int, element: int, type_: int, box: Sequence[int],
                            shape: Sequence[int], strides: Sequence[int], padding: int) -> TensorMap:  # fmt: skip
        return TensorMap.encode(address, swizzle, element, type_, box, shape, strides, padding)

    fill_tma_descriptor_tiled = fill_tma_descriptor  # the name in Triton 3.7


class Launcher:
    """Runs one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = list(source.signature.values())
        self.names = list(source.signature)
        self.attributes = dict(source.attrs)
        self.maps = list(getattr(metadata, "tensordesc_meta", None) or [])
        self.metadata = metadata
        if metadata.num_ctas != 1:
            raise PtxError("clusters are not modelled")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise PtxError("scratch memory is not modelled")
        name = source.name[:150]
        files = get_cache_manager(metadata.hash).get_group(f"{name}.json") or {}
        self.ptx = Path(files[f"{name}.ptx"]).read_text()

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, stream: int, function: int, packed: Any,
                 launch_metadata: Any, enter: Any, leave: Any, *arguments: Any) -> None:  # fmt: skip
        if grid_x * grid_y * grid_z == 0:  # as the real launcher does
            return
        driver = triton.runtime.driver.active
        values: list[Any] = []
        tensors: list[tuple[str, torch.Tensor]] = []
        maps = iter(self.maps)
        for index, (name, type_, argument) in enumerate(
            zip(self.names, self.signature, arguments, strict=True)
        ):
            if type_ == "constexpr":
                continue
            if isinstance(type_, tuple):
                raise PtxError(f"{name}: tuples are not modelled")
            if type_.startswith("tensordesc"):
                base = getattr(argument, "base", argument)
                tensors.append((name, base))
                expanded = make_tensordesc_arg(argument, next(maps) if self.maps else None)
                values += [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in expanded]
                continue
            if isinstance(argument, torch.Tensor):
                tensors.append((name, argument))
                argument = argument.data_ptr()
            self._check_divisible(index, name, argument)
            values.append(argument)
        driver.launches.append(self.metadata.name)
        launch(
            _code(self.ptx),
            (grid_x, grid_y, grid_z),
            self.metadata.shared,
            [*values, 0, 0],
            tensors,
            driver.mode,
        )

    def _check_divisible(self, index: int, name: str, value: Any) -> None:
        """An argument compiled as a multiple of 16 must be one."""
        if ["tt.divisibility", 16] in self.attributes.get((index,), []) and int(value) % 16:
            raise PtxError(f"{name}={value:#x} was compiled as a multiple of 16")


class Driver(DriverBase):  # type: ignore[misc]
    """See the module."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.launches: list[str] = []
        self.utils = Utils()
        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        return None

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed here")


def mode_from_environment() -> Mode:
    """The mode that MINICPM_SM90_MODE names: eager, lazy or random, and after a colon a seed."""
    asynchronous, _, seed = os.environ.get("MINICPM_SM90_MODE", "eager").partition(":")
    if asynchronous not in ("eager", "lazy", "random"):
        raise ValueError(f"MINICPM_SM90_MODE: {asynchronous!r} is not eager, lazy or random")
    return Mode(asynchronous=asynchronous, seed=int(seed) if seed else None)  # type: ignore[arg-type]


@contextmanager
def use(mode: Mode | None = None) -> Iterator[Driver]:
    """Make this Triton's driver for a while."""
    config = triton.runtime.driver
    before = config._active
    driver = Driver(mode or Mode())
    config.set_active(driver)
    try:
        yield driver
    finally:
        config._active = before
