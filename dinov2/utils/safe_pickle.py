"""Reading pickles of plain values and numpy arrays; nothing that a file says is run."""

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PYTHON_3 = {"__builtin__": "builtins"}  # protocols below 3 keep Python 2's names of modules
MAX_SHOWN = 300  # characters of what is wrong: a file may call a class what it likes
MAX_KEY = 1000  # values in a key of a dict or an entry of a set
PLAIN_DTYPE = re.compile(r"[biufcSU][0-9]+")

# A damaged pickle makes the unpickler, and what it calls, stumble over anything.
STUMBLES = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def load_safe_pickle(path: str | Path) -> Any:
    """Reads a pickle that holds builtin values and numpy arrays, dtypes and scalars, of any protocol.

    An ordinary unpickler calls whatever the file names. This one knows a short list of names and answers each with a
    function of its own, those of numpy too: numpy's reconstruction trusts the file, and a crafted dtype makes it take
    bytes for addresses. Arrays of objects and of records are therefore refused. Text of Python 2 is read as latin-1.

    Args:
        path: the file; the names of numpy 1 and of numpy 2 are known.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file and the class that is refused, or what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return read_safe_pickle(path.read_bytes(), str(path))


def read_safe_pickle(content: bytes, name: str) -> Any:
    """Reads a pickle from bytes, such as a member of an archive (see `load_safe_pickle`).

    Args:
        content: the pickle.
        name: names the pickle in errors.

    Raises:
        ValueError: naming the class that is refused, or what is wrong with the file.
    """
    try:
        _check_keys(content)
        return _finish(_PlainUnpickler(io.BytesIO(content), encoding="latin1").load(), {})
    except STUMBLES as error:
        cause = (str(error) or type(error).__name__)[:MAX_SHOWN]
        raise ValueError(f"{name} is not a pickle of plain values and arrays: {cause}") from error


def _check_keys(content: bytes) -> None:
    """Refuses keys that take for ever to hash: tuples that hold one another in twos, or are nested without end.

    The unpickler hashes a key while it reads, so this goes through the file before, with the number of values in each
    tuple in the place of the tuple; all else counts as one value.
    """
    stack: list[int] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[int, int] = {}
    for code, argument, _ in pickletools.genops(content):
        before, taken = code.stack_before, stack[:0]
        if pickletools.markobject in before:
            start = marks.pop()
            taken, before = stack[start:], before[: before.index(pickletools.markobject)]
            del stack[start:]
        if before and not (code.name == "POP" and marks[-1:] == [len(stack)]):
            taken = stack[-len(before) :] + taken
            del stack[-len(before) :]
        keys = {"SETITEM": taken[1:2], "SETITEMS": taken[1::2], "DICT": taken[::2], "ADDITEMS": taken[1:]}
        if code.name == "FROZENSET" or code.name in keys:
            _check_key_sizes(keys.get(code.name, taken))
        if code.name == "MARK":
            marks.append(len(stack))
        elif code.name == "POP" and not taken:
            marks.pop()
        elif "GET" in code.name:
            stack.append(memo[int(argument or 0)])
        elif "PUT" in code.name:
            memo[int(argument or 0)] = stack[-1]
        elif code.name in ("MEMOIZE", "DUP"):
            memo |= {len(memo): taken[0]} if code.name == "MEMOIZE" else {}
            stack += taken * len(code.stack_after)
        else:
            is_sum = "TUPLE" in code.name or code.name in ("FROZENSET", "REDUCE")
            stack += [min(1 + sum(taken), MAX_KEY + 1) if is_sum else 1] * len(code.stack_after)


def _check_key_sizes(sizes: Iterable[int]) -> None:
    if any(size > MAX_KEY for size in sizes):
        raise ValueError(f"a key of more than {MAX_KEY} values is refused")


def _count_values(entry: object) -> int:
    """How many values a tuple holds, counted to `MAX_KEY` and a little further."""
    left, count = [entry], 0
    while left and count <= MAX_KEY:
        value, count = left.pop(), count + 1
        left += value if isinstance(value, tuple) else ()
    return count


class _Name:
    """What a name in a pickle becomes. Unlike a function or class it gives a pickle nothing to set or to subclass."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *arguments: object) -> Any:
        return self.call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise ValueError("it changes a function or class, which is refused")


class _Dtype:
    """A numpy dtype while it is read: made from a code such as ``i8``, then given its state."""

    __slots__ = ("dtype",)

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not PLAIN_DTYPE.fullmatch(code):
            raise ValueError(f"numpy.dtype {code!r} is refused: only numbers, booleans and text are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _, order, subdtype, names, fields, *_ = state
        if any(entry is not None for entry in (subdtype, names, fields)):
            raise ValueError("numpy.dtype of records is refused: only numbers, booleans and text are read")
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"numpy.dtype has the unknown byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """A numpy array while it is read: made empty, then given its state."""

    __slots__ = ("array",)

    def __init__(self, kind: object, *_: object) -> None:
        if kind is not NDARRAY:
            raise ValueError("an array of another class than numpy.ndarray is refused")
        self.array: npt.NDArray[Any] | None = None

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _make_array(data, dtype, shape, "F" if is_fortran else "C")


def _make_array(data: object, dtype: object, shape: object, order: object = "C") -> npt.NDArray[Any]:
    """Stands for ``_frombuffer`` of numpy."""
    if isinstance(data, str):  # Python 2 has one type for bytes and text
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
        raise ValueError("an array without plain data, dtype and shape is refused")
    flat = np.frombuffer(data, dtype.dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C").copy(order="K")  # a copy can be written to


def _make_scalar(dtype: object, data: object) -> Any:
    """Stands for ``scalar`` of numpy."""
    return _make_array(data, dtype, ())[()]


def _make_ndarray(*_: object) -> None:
    raise ValueError("a call of numpy.ndarray is refused")


def _filled(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for a type that holds what it is given; numbers and ranges let a file of a few bytes fill the memory."""

    def make(*arguments: object) -> Any:
        if arguments and isinstance(arguments[0], int | range):
            raise ValueError(f"{kind.__name__} of a number or a range is refused")
        if arguments and isinstance(arguments[0], list | tuple):
            _check_key_sizes(map(_count_values, arguments[0]))
        return kind(*arguments)

    return make


def _encode(text: object, encoding: object = None) -> bytes:
    """Stands for ``_codecs.encode``, with which protocols below 3 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError(f"_codecs.encode to {encoding!r} is refused")
    return text.encode("latin1")


NDARRAY = _Name(_make_ndarray)
NUMPY_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": _Array,
    "multiarray.scalar": _make_scalar,
    "numeric._frombuffer": _make_array,
}
NAMES = {
    **{f"builtins.{kind.__name__}": _Name(_filled(kind)) for kind in (bytes, bytearray, frozenset, set)},
    "builtins.complex": _Name(complex),
    "builtins.range": _Name(range),
    "builtins.xrange": _Name(range),  # of Python 2
    "_codecs.encode": _Name(_encode),
    "numpy.dtype": _Name(_Dtype),
    "numpy.ndarray": NDARRAY,
    **{f"numpy.core.{name}": _Name(function) for name, function in NUMPY_FUNCTIONS.items()},  # numpy 1
    **{f"numpy._core.{name}": _Name(function) for name, function in NUMPY_FUNCTIONS.items()},  # numpy 2
}


class _PlainUnpickler(pickle.Unpickler):
    """Finds `NAMES` only."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{PYTHON_3.get(module, module)}.{name}"
        if full_name not in NAMES:
            raise pickle.UnpicklingError(f"it refers to {full_name}, which is refused")
        return NAMES[full_name]


def _finish(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Puts arrays and dtypes in the place of what stood for them; ``done`` holds the containers met, by id."""
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, _Name):
        raise ValueError("a function or class as a value is refused")
    if isinstance(value, _Dtype):
        return value.dtype
    if isinstance(value, _Array):
        if value.array is None:
            raise ValueError("an array without data is refused")
        return value.array
    result = value
    if isinstance(value, list):
        done[id(value)] = (value, value)  # before its entries, which may be the list itself
        value[:] = [_finish(entry, done) for entry in value]
    elif isinstance(value, dict):
        done[id(value)] = (value, value)
        entries = [(_finish(key, done), _finish(entry, done)) for key, entry in value.items()]
        value.clear()
        value.update(entries)
    elif isinstance(value, tuple | set | frozenset):
        result = type(value)(_finish(entry, done) for entry in value)
        done[id(value)] = (value, result)
    return result
