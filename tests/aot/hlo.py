"""Finds big arrays that a compiled program makes anew, in the text of its optimised HLO.

A pool that is written in place is a parameter, is passed through tuples, loops and bitcasts, and is
the target of scatters and slice updates. Anything else as large is a copy of it, whatever it is
called. In the optimised HLO all copies are decided.
"""

import math
import re
from dataclasses import dataclass

ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip

_PASSES = {
    "parameter", "bitcast", "tuple", "get-tuple-element", "while", "conditional", "call",
    "optimization-barrier",
}  # fmt: skip
_UPDATES = {"scatter", "dynamic-update-slice", "async-update", "async-done"}


@dataclass(frozen=True)
class Instruction:
    """One line. `text` is all of it."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def largest_bytes(self) -> int:
        """Of the arrays it yields."""
        return max((_array_bytes(*found) for found in _ARRAY.findall(self.shape)), default=0)


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")


def _array_bytes(kind: str, dims: str) -> int:
    return math.prod(map(int, filter(None, dims.split(",")))) * ITEM_BITS.get(kind, 0) // 8


def find_copies(hlo: str, min_bytes: int) -> list[str]:
    """Lines that make an array of `min_bytes` or more other than by updating one in place."""
    computations = _parse(hlo)
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", hlo))
    found = []
    for name, instructions in computations.items():
        if name in fused:
            continue
        for instruction in instructions:
            if instruction.largest_bytes < min_bytes or instruction.opcode in _PASSES | _UPDATES:
                continue
            if instruction.opcode == "custom-call" and "output_to_operand_aliasing" in (
                instruction.text
            ):
                continue
            if instruction.opcode == "fusion":
                called = re.search(r"calls=%?([\w.\-]+)", instruction.text)
                if called and _updates_in_place(computations[called[1]], min_bytes):
                    continue
            found.append(instruction.text.strip()[:200])
    return found


def _updates_in_place(body: list[Instruction], min_bytes: int) -> bool:
    """Whether each big array of a fusion's root is an update of one of its parameters."""
    by_name = {instruction.name: instruction for instruction in body}

    def is_update(name: str) -> bool:
        at = by_name[name]
        if at.opcode == "tuple":
            big = [x for x in at.operands if by_name[x].largest_bytes >= min_bytes]
            return all(map(is_update, big))
        if at.opcode == "bitcast":
            return is_update(at.operands[0])
        return at.opcode in _UPDATES and is_parameter(at.operands[0])

    def is_parameter(name: str) -> bool:
        at = by_name[name]
        if at.opcode in ("bitcast", *_UPDATES):  # one update after the other
            return is_parameter(at.operands[0])
        return at.opcode == "parameter"

    return is_update(body[-1].name)


def _parse(hlo: str) -> dict[str, list[Instruction]]:
    """Instructions by computation, the root last."""
    computations: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    root: Instruction | None = None
    for line in hlo.splitlines():
        header = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line) or re.match(
            r"^(?:ENTRY )?%?([\w.\-]+) \{$", line
        )
        if header:
            body, root = [], None
            computations[header[1]] = body
        elif line.startswith("}"):
            if root is not None:
                body.remove(root)
                body.append(root)
        elif match := _LINE.match(line):
            is_root, name, rest = match.groups()
            shape, rest = _split_shape(rest)
            called = re.match(r"([\w\-]+)\(", rest)
            if called is None:
                continue
            arguments = _balanced(rest[called.end() - 1 :])
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            instruction = Instruction(name, shape, called[1], operands, line)
            body.append(instruction)
            root = instruction if is_root else root
    return computations


def _split_shape(rest: str) -> tuple[str, str]:
    """A shape, which may be a tuple, and what follows it."""
    if rest.startswith("("):
        shape = _balanced(rest)
        return shape, rest[len(shape) :].lstrip()
    shape, _, rest = rest.partition(" ")
    return shape, rest


def _balanced(text: str) -> str:
    """From the opening parenthesis at the start to the one that closes it."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[: index + 1]
    return text
