"""Reads pickles without running any code in them.

A pickle is a program: Python's own `Unpickler` imports what it names and calls what it asks for.
Here its instructions are only decoded (by `pickletools`) and carried out on a stack of plain values
by the few lines below. The reader of a format admits some names, each of which stands for a
harmless function of ours. Every other object is not made: a `Skipped` stands in its place, whatever
is asked of it, so that an optimizer or the arguments of a command may lie beside the weights.
"""

import dataclasses
import math
import pickletools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_alexnet.weights.stored import is_shape

# Weight files take some thousands; each costs a microsecond and at most some hundred bytes.
MOST_INSTRUCTIONS = 1_000_000
LONGEST_KEY = 1000  # characters, of the names of functions too
# Bytes of a pickle, with those that its calls make: of names, of numbers that describe tensors, and
# of what else there is in the checkpoint of a training.
LARGEST_PICKLE = 64 * 10**6
LONGEST_VALUE = 302 * 10**6  # bytes: the 37,748,736 numbers of fc6, in 64 bits
LONGEST_LINE = 2**24  # bytes of a text in letters, as protocol 0 has it
LONGEST_TEXT = 240 * 10**6  # bytes: as many numbers of 32 bits, as Python 3 writes them for 2
MOST_ARGUMENTS = 16  # of a function; those of PyTorch and NumPy have up to seven

# What goes wrong when instructions make no sense together, and in reading any damaged file.
NONSENSE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError),
    *(LookupError, MemoryError, RuntimeError, TypeError, ValueError),
)


class PickleError(Exception):
    """A pickle is damaged, or asks for more than arrays and plain containers."""


class Global(NamedTuple):
    """A name that a pickle may ask for, and the function of ours that stands for it, if any."""

    name: str
    call: Callable[..., Any] | None


@dataclasses.dataclass(eq=False)
class Skipped:
    """What stands for an object that was not made, by the name of its class or function."""

    name: str

    def refusal(self) -> PickleError:
        """The error for one that is needed."""
        return PickleError(
            f"it asks for {_short(self.name)}, and only arrays and plain containers are read from "
            "a pickle, since anything else could run code; save the bare weights"
        )


def read_pickle(
    file: Any,
    admitted: Mapping[str, Callable[..., Any] | None],
    persistent: Callable[[Any], Any] | None = None,
    largest: int = LARGEST_PICKLE,
) -> Any:
    """The value of one pickle, of any protocol; strings of Python 2 are read as Latin-1.

    Args:
      file: stands at the pickle's first byte, and after its last when it has been read.
      admitted: names that may be asked for, such as "collections.OrderedDict", with a function
        that is called in its place; None for a name that is never called.
      persistent: from a persistent id to the value that it stands for.
      largest: bytes that the pickle may have, with those that its calls make of them.

    Returns:
      Plain values, and a `Skipped` for every object within that is none.

    Raises:
      PickleError: in one line; it is damaged, or is an object as a whole.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in text of protocol 0
            value = _run(_Metered(file, largest), admitted, persistent)
    except NONSENSE as error:
        raise PickleError(f"it is damaged ({_short(str(error) or type(error).__name__)})") from None
    if isinstance(value, Skipped):
        raise value.refusal()
    return value


_TEXTS = (b"X", b"\x8d")  # BINUNICODE and BINUNICODE8
_LAST_OF_LATIN_1 = 0xC3  # the largest byte of such letters in UTF-8


class _Metered:
    """A stream of a limited number of bytes; what is made of them counts as if it were read.

    A call costs a few bytes of a pickle, and could copy a long value that was read once each time.
    """

    def __init__(self, file: Any, largest: int):
        self._file, self._left, self._largest = file, largest, largest
        self._code = b""

    def count(self, size: int) -> None:
        """Takes so many bytes from what is left; raises PickleError where that is less."""
        self._left -= size
        if size > LONGEST_VALUE:
            raise PickleError(f"it has a value of more than {LONGEST_VALUE:,} bytes")
        if self._left < 0:
            raise PickleError(f"it takes more than {self._largest:,} bytes")

    def read(self, size: int) -> bytes:
        self.count(size)
        data = self._file.read(size)
        if size == 1:
            self._code = data  # of an instruction, or within the argument of one with a short text
        elif self._code in _TEXTS:
            if size > LONGEST_TEXT:
                raise PickleError(f"it has a text of more than {LONGEST_TEXT:,} bytes")
            if (np.frombuffer(data, np.uint8) > _LAST_OF_LATIN_1).any():
                self.count(3 * size)  # a single letter of many bits makes four bytes of each
        return data

    def readline(self) -> bytes:
        line = self._file.readline(LONGEST_LINE)
        self.count(len(line))
        return line


def _run(file: Any, admitted: Mapping[str, Any], persistent: Any) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each mark
    memo: dict[int, Any] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == MOST_INSTRUCTIONS:
            raise PickleError(f"it has more than {MOST_INSTRUCTIONS:,} instructions")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                below.append(stack)
                stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case name if name in _LITERALS:
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(Skipped("builtins.set"))
            case "BYTEARRAY8":
                stack.append(Skipped("builtins.bytearray"))
            case "FROZENSET" | "OBJ" | "INST":
                stack = below.pop()
                stack.append(Skipped(f"an object by {opcode.name}"))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                _check(len(stack) >= size)
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE" | "LIST" | "DICT" as name:
                items, stack = stack, below.pop()
                value: Any = {"TUPLE": tuple, "LIST": list}.get(name, lambda _: {})(items)
                if name == "DICT":
                    _set_items(value, items)
                stack.append(value)
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items, stack = stack, below.pop()
                _extend(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, below.pop()
                _set_items(stack[-1], items)
            case "POP":
                stack.pop()
            case "POP_MARK":
                stack = below.pop()
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_find(argument.replace(" ", "."), admitted))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                _check(isinstance(name, str) and isinstance(module, str))
                _check(len(name) + len(module) <= LONGEST_KEY)
                stack.append(_find(f"{module}.{name}", admitted))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                _check(isinstance(arguments, tuple) and isinstance(function, Global | Skipped))
                if isinstance(function, Skipped):
                    stack.append(Skipped(function.name))
                elif function.call is None:
                    raise PickleError(f"it calls {_short(function.name)}")
                else:
                    _check(len(arguments) <= MOST_ARGUMENTS)
                    file.count(sum(map(_size, arguments)))
                    stack.append(function.call(*arguments))
            case "NEWOBJ" | "NEWOBJ_EX":
                del stack[-1 if opcode.name == "NEWOBJ" else -2 :]  # its arguments
                _check(isinstance(stack[-1], Global | Skipped))
                stack[-1] = Skipped(stack[-1].name)
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Skipped):
                    pass
                elif isinstance(stack[-1], np.ndarray):
                    file.count(_fill(stack[-1], state))
                elif isinstance(stack[-1], _DType):
                    stack[-1].order = state[1]
                else:  # attributes of a dictionary, such as PyTorch's _metadata, are passed over
                    _check(isinstance(stack[-1], dict))
            case "BINPERSID" if persistent:
                stack.append(persistent(stack.pop()))
            case other:
                raise PickleError(f"it has the instruction {other}, which no weights need")
    raise ValueError("it ends too early")


_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
        *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    }
)


def _find(name: str, admitted: Mapping[str, Any]) -> Global | Skipped:
    return Global(name, admitted[name]) if name in admitted else Skipped(name)


def _extend(items: Any, more: list[Any]) -> None:
    _check(isinstance(items, list | Skipped))
    if isinstance(items, list):
        items.extend(more)


def _set_items(items: Any, more: list[Any]) -> None:
    _check(isinstance(items, dict | Skipped))
    if isinstance(items, dict):
        items.update(dictionary(zip(more[::2], more[1::2], strict=True)))


def dictionary(items: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """A dictionary of pairs, for "collections.OrderedDict" too; its keys are names or numbers.

    Of other keys only a `Skipped` is there, and of very long ones: they could be nested tuples,
    whose hashes take as long as their author likes, or fill the memory with their copies.
    """
    return {k if _is_key(k) else Skipped(type(k).__name__): v for k, v in items}


def _is_key(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_KEY
    if isinstance(value, int):
        return value.bit_length() <= 64
    return isinstance(value, float | None | Skipped)


class _DType:
    """A dtype, whose byte order follows after it was made."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False):
        del align, copy
        self.code, self.order = code, "="

    def numpy(self) -> np.dtype:
        # Python 2 wrote "O8". Codes of several types could ask for any amount of memory.
        known = isinstance(self.code, str) and re.fullmatch(r"[fiub]\d{1,2}|O8?", self.code)
        if known and self.order in ("<", ">", "=", "|"):
            return np.dtype(self.order + self.code)
        raise PickleError("it has an array of something else than numbers")


def _new_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """NumPy makes an array empty; its state follows."""
    del shape, code
    _check(isinstance(kind, Global) and kind.name == "numpy.ndarray")
    return np.empty(0, np.float32)


def _fill(array: np.ndarray, state: Any) -> int:
    """Sets the state of an array, and returns how many bytes were copied."""
    data: Any
    _, shape, kind, fortran_order, data = state
    dtype, copied = kind.numpy(), 0
    if dtype.hasobject:
        # `np.save` wraps a dictionary so; anything else is a container that we need not know.
        if shape != () or not isinstance(data, list) or len(data) != 1:
            raise PickleError("it has an array of objects")
    else:
        copied = len(data) * (isinstance(data, str) or dtype.byteorder not in "=|")
        data = data.encode("latin-1") if isinstance(data, str) else data
        _check(isinstance(data, bytes) and is_shape(shape))
        if math.prod(shape) * dtype.itemsize != len(data):
            size = "×".join(map(str, shape))
            raise PickleError(f"it has an array of {_short(size)}, but {len(data):,} bytes for it")
    array.__setstate__((1, shape, dtype, int(fortran_order == 1), data))  # type: ignore[arg-type]
    return copied


def _scalar(kind: Any, data: Any) -> Any:
    dtype = kind.numpy()
    _check(not dtype.hasobject)
    (value,) = np.frombuffer(data, dtype)
    return value


def _encode(text: Any, codec: Any) -> bytes:
    """How Python 3 writes bytes for Python 2 to read."""
    _check(isinstance(text, str) and codec in ("latin1", "latin-1"))
    return text.encode("latin-1")


# What a pickle of NumPy's arrays asks for.
NUMPY: Mapping[str, Callable[..., Any] | None] = {
    "__builtin__.bytes": lambda: b"",  # how Python 3 writes these for Python 2
    "numpy.ndarray": None,
    "numpy.dtype": _DType,
    "_codecs.encode": _encode,
    **{
        f"numpy.{core}.multiarray.{name}": function
        for core in ("core", "_core")  # before NumPy 2, and since
        for name, function in (("_reconstruct", _new_array), ("scalar", _scalar))
    },
}


def _size(value: Any) -> int:
    """Bytes that a function may make of an argument, roughly: an entry of a dictionary has 100."""
    if isinstance(value, list | tuple | dict):
        return 100 * len(value)
    return len(value) if isinstance(value, str | bytes) else 0


def _check(sane: bool) -> None:
    if not sane:
        raise ValueError("its instructions make no sense")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."
