"""How much work a pickle makes, told before anything reads it.

``torch.load(weights_only=True)`` runs no code of a file, but a few hundred bytes can keep it busy for hours:
a tuple of two references to a tuple of two references, and so on, has 2ⁿ elements when it is hashed as a key.
Here the opcodes are followed with nothing but sizes on the stack.
"""

import pickle
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_OPCODES = 2_000_000
"""A tensor takes about 50, so that is some 40,000 tensors, far more than a model and its optimizer have."""
MAX_KEY = 100
"""Elements of a key of a dictionary, with all that is in them. Ours are texts and numbers."""
MAX_ARGUMENTS = 10_000
"""Elements of what a tensor is rebuilt from: about 30."""


class TooMuchWork(ValueError):
    """Reading a file would take more than its size explains."""


@dataclass(eq=False, slots=True)
class _Value:
    """What lies on the stack: how much is in it, and whether it is in something else."""

    size: int
    inside: bool = False


_ENDLESS = 1 << 40  # larger sizes are not told apart: the numbers themselves would grow
_MARK = _Value(0)
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_NOTHING = {"PROTO", "FRAME", "STOP"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}
# Of one number, or one list of texts.
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

    ``flat`` allows a number, a text, or one list of these, whose elements may then be printed or become keys.
    Raises ``pickle.UnpicklingError`` if it is damaged or not flat, ``TooMuchWork`` if it is that. Time and
    memory are in proportion to the bytes that are read.
    """
    stack: list[_Value] = []
    memo: dict[Any, _Value] = {}
    lists = 0
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_OPCODES:
                raise TooMuchWork(f"it has more than {MAX_OPCODES} steps")
            name = opcode.name
            if name in _NOTHING:
                continue
            if flat:
                lists += name == "EMPTY_LIST"
                if name not in _FLAT or lists > 1:
                    raise pickle.UnpicklingError("it is no number, no text and no list of them")
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
    except TooMuchWork:
        raise
    except Exception as error:  # pickletools and an empty stack raise many kinds
        raise pickle.UnpicklingError(str(error)) from None


def _step(opcode: pickletools.OpcodeInfo, stack: list[_Value]) -> None:
    """Takes off the stack what an opcode takes, and puts there what it puts."""
    taken = list(_taken(opcode, stack))
    size = min(1 + sum(one.size for one in taken), _ENDLESS)
    if opcode.name in _CALLS and size > MAX_ARGUMENTS:
        raise TooMuchWork(f"an object in it is made of more than {MAX_ARGUMENTS} parts")
    if opcode.name in ("SETITEM", "SETITEMS", "DICT"):
        first = 0 if opcode.name == "DICT" else 1
        if any(one.size > MAX_KEY for one in taken[first::2]):
            raise TooMuchWork(f"a key in it has more than {MAX_KEY} parts")
    if opcode.name == "BINPERSID" and size > MAX_KEY:  # it says where values are stored, and becomes a key
        raise TooMuchWork(f"a place of values in it has more than {MAX_KEY} parts")
    if opcode.name == "ADDITEMS" and any(one.size > MAX_KEY for one in taken[1:]):
        raise TooMuchWork(f"an element of a set in it has more than {MAX_KEY} parts")
    if opcode.name in _INTO:
        _grow(taken[0], size, opcode)
        stack.append(taken[0])
    else:
        stack.extend(_Value(size) for _ in opcode.stack_after)
    if opcode.name not in _DROPS:
        for part in taken[1:] if opcode.name in _INTO else taken:
            part.inside = True


def _grow(value: _Value, size: int, opcode: pickletools.OpcodeInfo) -> None:
    """Gives a container its new size. It must not be in another one yet, whose size would then be wrong.

    ``pickle`` itself fills a container after it was put into another one only where they hold each other.
    """
    if value.inside and opcode.name == "BUILD":
        raise pickle.UnpicklingError("it holds objects that hold each other")
    if value.inside:
        raise TooMuchWork("a container in it is filled after it was put into another one")
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
