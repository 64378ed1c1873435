"""A program made ready to run: runs of computing instructions as one Python function each, the rest as closures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptx_emulator.errors import PtxError
from ptx_emulator.instructions import alu, dispatch
from ptx_emulator.memory.spaces import SHARED_BASE
from ptx_emulator.parser import Instruction, Label, Program, Sym

PARAM_BASE = 1 << 62  # the address of the first parameter; each has a page of its own
PARAM_PAGE = 4096


@dataclass
class Node:
    """A step of a warp: either `compute`, which only changes registers (those in `writes`), or `act`."""

    instructions: list[Instruction]
    compute: Callable[[list[Any]], None] | None = None
    act: Callable[[Any, Any], Any] | None = None
    writes: tuple[int, ...] = ()


class Code:
    """A kernel's nodes, and the places of its labels among them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.param_addresses = {p.name: PARAM_BASE + i * PARAM_PAGE for i, p in enumerate(program.params)}
        self.symbols = dict(self.param_addresses) | {"global_smem": SHARED_BASE}
        self.labels: dict[str, int] = {}
        self.nodes: list[Node] = []
        targets = _branch_targets(program)
        pending: list[Instruction] = []
        for item in program.body:
            if isinstance(item, Label):
                if item.name in targets:
                    self._flush(pending)
                    self.labels[item.name] = len(self.nodes)
            elif item.root in alu.HANDLERS:
                pending.append(item)
            else:
                self._flush(pending)
                self.nodes.append(Node([item]))
        self._flush(pending)
        for node in self.nodes:  # after all labels are known
            if node.compute is None:
                node.act = dispatch.decode(node.instructions[0], self)

    def _flush(self, instructions: list[Instruction]) -> None:
        """Make one node of these instructions."""
        if not instructions:
            return
        source = alu.Source(self.symbols)
        lines = []
        writes: list[int] = []
        for instruction in instructions:
            try:
                lines += [f"    {line}" for line in alu.HANDLERS[instruction.root](instruction, source)]
            except (ValueError, KeyError, AssertionError, StopIteration) as error:
                raise PtxError(f"cannot decode {instruction.text!r} ({error!r})") from error
            writes += alu.written(instruction)
        namespace = alu.NAMESPACE | source.constants
        exec("def compute(R):\n" + "\n".join(lines), namespace)
        self.nodes.append(
            Node(list(instructions), compute=namespace["compute"], writes=tuple(dict.fromkeys(writes)))
        )
        instructions.clear()


def _branch_targets(program: Program) -> set[str]:
    names = {name for table in program.tables.values() for name in table}
    for item in program.body:
        if isinstance(item, Instruction) and item.root == "bra":
            names |= {x.name for x in item.operands if isinstance(x, Sym)}
    return names
