"""Read a compiled kernel's instructions: how its main loop loads the three units that can bound it.

Cycles are those of one of the four partitions of a Hopper SM, for one warp and one turn of the loop. They
assume that nothing waits, so the largest of the three is a bound from below and their ratio a ceiling, never a time.

- tensor: a 64xN product 16 deep keeps the tensor cores busy for N/2 cycles (4,096 operations a cycle and
  SM: 989 TFLOP/s at 132 SMs and 1.83 GHz); products of 8-bit types do not occur here;
- special: exponentials, logarithms, reciprocals, 4 lanes a cycle (CUDA C++ Programming Guide, table of throughputs of
  arithmetic instructions, compute capability 9.0);
- issue: one instruction a cycle, whatever it is.
"""

import itertools
import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)([^;]*);")
_SPECIAL_CYCLES = 8
_LEAVES = ("EXIT", "RET")


@dataclass(frozen=True, kw_only=True)
class LoopLoad:
    """Cycles of one warp in one turn of a loop: tensor cores, special functions, instruction issue."""

    tensor: int
    special: int
    issue: int


@dataclass(frozen=True, kw_only=True)
class _Instruction:
    address: int
    conditional: bool
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a direct branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.split(".")[0] == "BRA" else None
        return int(found[1], 16) if found else None


def main_loop(sass: str) -> LoopLoad | None:
    """The load of the innermost loop that has the most tensor work for its instructions; None without any.

    Takes what `cuobjdump --dump-sass` prints. A kernel that has a masked and an unmasked loop is so judged by the
    unmasked one, in which it spends its time.
    """
    loops = [_load(body) for body in _innermost_loops(_parse(sass))]
    loops = [load for load in loops if load.tensor]
    return max(loops, key=lambda load: (load.tensor / load.issue, load.tensor), default=None)


def _parse(sass: str) -> list[_Instruction]:
    return [
        _Instruction(
            address=int(match[1], 16), conditional=match[2] is not None, name=match[3], operands=match[4]
        )
        for match in _INSTRUCTION.finditer(sass)
    ]


def _load(body: list[_Instruction]) -> LoopLoad:
    shapes = [re.match(r"HGMMA\.64x(\d+)x", instruction.name) for instruction in body]
    return LoopLoad(
        tensor=sum(int(shape[1]) // 2 for shape in shapes if shape),
        special=_SPECIAL_CYCLES * sum(instruction.name.startswith("MUFU") for instruction in body),
        issue=len(body),
    )


def _innermost_loops(program: list[_Instruction]) -> list[list[_Instruction]]:
    """Bodies of the natural loops that have tensor work and hold no smaller such loop."""
    blocks, successors = _blocks(program)
    loops: dict[int, set[int]] = {}
    dominators = _dominators(successors)
    for block, targets in successors.items():
        for head in targets:
            if head in dominators.get(block, ()):
                loops.setdefault(head, set()).update(_natural_loop(successors, head, block))
    with_products = {
        head: body
        for head, body in loops.items()
        if any(instruction.name.startswith("HGMMA") for block in body for instruction in blocks[block])
    }
    return [
        [instruction for block in sorted(body) for instruction in blocks[block]]
        for body in with_products.values()
        if not any(other < body for other in with_products.values())
    ]


def _blocks(program: list[_Instruction]) -> tuple[dict[int, list[_Instruction]], dict[int, list[int]]]:
    """Basic blocks by the address of their first instruction, and where each can go."""
    addresses = {instruction.address for instruction in program}
    starts = {program[0].address} if program else set()
    for instruction, following in itertools.pairwise(program):
        if instruction.target is not None:
            starts.add(instruction.target)
        if instruction.target is not None or instruction.name.startswith(_LEAVES):
            starts.add(following.address)
    blocks: dict[int, list[_Instruction]] = {}
    for instruction in program:
        if instruction.address in starts:
            blocks[instruction.address] = current = []
        current.append(instruction)
    order = list(blocks)
    successors: dict[int, list[int]] = {}
    for block, next_block in itertools.zip_longest(order, order[1:]):
        last = blocks[block][-1]
        goes_on = last.conditional or (last.target is None and not last.name.startswith(_LEAVES))
        targets = (last.target if last.target in addresses else None, next_block if goes_on else None)
        successors[block] = [target for target in targets if target is not None]
    return blocks, successors


def _dominators(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each block that can be reached, those that every way to it passes."""
    entry = next(iter(successors))
    order, seen, stack = [], {entry}, [(entry, iter(successors[entry]))]
    while stack:
        block, targets = stack[-1]
        target = next((x for x in targets if x not in seen), None)
        if target is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(successors[target])))
    order.reverse()
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in successors[block]:
            predecessors[target].append(block)
    dominators = {block: set(order) for block in order} | {entry: {entry}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(dominators[x] for x in predecessors[block])) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def _natural_loop(successors: dict[int, list[int]], head: int, tail: int) -> set[int]:
    """The blocks from which ``tail`` can be reached without passing ``head``."""
    body, stack = {head, tail}, [tail] if tail != head else []
    while stack:
        block = stack.pop()
        for other, targets in successors.items():
            if block in targets and other not in body:
                body.add(other)
                stack.append(other)
    return body
