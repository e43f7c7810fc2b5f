"""Checks how much work loading a pickle would be, before it is loaded.

``torch.load(weights_only=True)`` runs no code from a file, but a few hundred bytes can keep it busy for
hours: a tuple of two references to a tuple of two references, and so on, has 2ⁿ elements when it is hashed as
a key. This module interprets the opcodes, but keeps only the size of each value on the stack.
"""

import pickle
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_OPCODES = 2_000_000
"""Enough for about 40,000 tensors, at 50 opcodes each: far more than a model and its optimizer have."""
MAX_KEY = 100
"""Elements in a dictionary key, including nested ones. Keys are usually strings and numbers."""
MAX_ARGUMENTS = 10_000
"""Elements in the arguments of a call. A tensor has about 30."""


class PickleTooExpensive(ValueError):
    """Loading a file would take much longer than its size suggests."""


@dataclass(eq=False, slots=True)
class _Value:
    """A stack entry: its number of elements, and whether it is inside another one."""

    size: int
    inside: bool = False


_ENDLESS = 1 << 40  # sizes are capped, or the numbers themselves would grow
_MARK = _Value(0)
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_NOTHING = {"PROTO", "FRAME", "STOP"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}
# Opcodes of a number, or of a list of strings.
_FLAT = {
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
}
_FLAT |= {"BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"}
_FLAT |= {"MARK", "EMPTY_LIST", "APPEND", "APPENDS", "MEMOIZE", *_PUT, *_GET}
_INTO = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_DROPS = {"POP", "POP_MARK"}


def check_pickle(stream: Any, *, flat: bool = False) -> None:
    """Reads one pickle from a binary stream up to its end.

    ``flat`` only allows a number, a string, or a list of these. Raises ``pickle.UnpicklingError`` if the
    pickle is damaged or not flat, ``PickleTooExpensive`` if loading it would take too long. Time and
    memory are proportional to its length.
    """
    stack: list[_Value] = []
    memo: dict[Any, _Value] = {}
    lists = 0
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_OPCODES:
                raise PickleTooExpensive(f"it has more than {MAX_OPCODES} opcodes")
            name = opcode.name
            if name in _NOTHING:
                continue
            if flat:
                lists += name == "EMPTY_LIST"
                if name not in _FLAT or lists > 1:
                    raise pickle.UnpicklingError("it is not a number, a string, or a list of these")
            if name == "MARK":
                stack.append(_MARK)
            elif name in _PUT:
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in _GET:
                stack.append(memo[argument])
            elif name == "DUP":
                stack.append(stack[-1])
            else:
                _step(opcode, stack)
    except PickleTooExpensive:
        raise
    except Exception as error:  # pickletools and an empty stack raise many kinds of errors
        raise pickle.UnpicklingError(str(error)) from None


def _step(opcode: pickletools.OpcodeInfo, stack: list[_Value]) -> None:
    """Pops what an opcode pops, and pushes what it pushes."""
    taken = list(_taken(opcode, stack))
    size = min(1 + sum(value.size for value in taken), _ENDLESS)
    if opcode.name in _CALLS and size > MAX_ARGUMENTS:
        raise PickleTooExpensive(f"an object in it has more than {MAX_ARGUMENTS} arguments")
    if opcode.name in ("SETITEM", "SETITEMS", "DICT"):
        first = 0 if opcode.name == "DICT" else 1
        if any(value.size > MAX_KEY for value in taken[first::2]):
            raise PickleTooExpensive(f"a key in it has more than {MAX_KEY} elements")
    if opcode.name == "BINPERSID" and size > MAX_KEY:  # the id of a storage, which becomes a key
        raise PickleTooExpensive(f"the id of a storage in it has more than {MAX_KEY} elements")
    if opcode.name == "ADDITEMS" and any(value.size > MAX_KEY for value in taken[1:]):
        raise PickleTooExpensive(f"an element of a set in it has more than {MAX_KEY} elements")
    if opcode.name in _INTO:
        _grow(taken[0], size, opcode)
        stack.append(taken[0])
    else:
        stack.extend(_Value(size) for _ in opcode.stack_after)
    if opcode.name not in _DROPS:
        for part in taken[1:] if opcode.name in _INTO else taken:
            part.inside = True


def _grow(value: _Value, size: int, opcode: pickletools.OpcodeInfo) -> None:
    """Sets the new size of a container. It must not be inside another one, whose size would then be wrong.

    ``pickle`` itself only fills a container after adding it to another one if they contain each other.
    """
    if value.inside and opcode.name == "BUILD":
        raise pickle.UnpicklingError("it contains objects that contain each other")
    if value.inside:
        raise PickleTooExpensive("a container in it is filled after it was added to another one")
    value.size = size


def _taken(opcode: pickletools.OpcodeInfo, stack: list[_Value]) -> Iterator[_Value]:
    before = opcode.stack_before
    if pickletools.markobject in before:
        fixed = before.index(pickletools.markobject)
        start = next(i for i in reversed(range(len(stack))) if stack[i] is _MARK)
        inside = stack[start + 1 :]
        del stack[start:]
        below = [stack.pop() for _ in range(fixed)]
        yield from reversed(below)
        yield from inside
    else:
        yield from reversed([stack.pop() for _ in before])
