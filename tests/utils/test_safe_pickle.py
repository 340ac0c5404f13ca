import collections
import functools
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov2.utils.safe_pickle import load_safe_pickle

PROTOCOLS = (2, 3, 4, 5)

# What numpy 1.26.4 wrote for `some_arrays()`, by protocol.
NUMPY_1 = Path(__file__).with_name("numpy_1_arrays.zip")

# What Python 2 writes for {"name": "ab", "set": set([1]), "number": 3L}, and for numpy's array([1, 258], "<i2").
PYTHON_2 = (
    b"\x80\x02}q\x00(U\x04nameq\x01U\x02abq\x02U\x03setq\x03c__builtin__\nset\nq\x04]q\x05K\x01a\x85q\x06Rq\x07"
    b"U\x06numberq\x08\x8a\x01\x03u."
)
PYTHON_2_ARRAY = (
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02U\x01bq\x03\x87q\x04Rq\x05"
    b"(K\x01K\x02\x85q\x06cnumpy\ndtype\nq\x07U\x02i2q\x08K\x00K\x01\x87q\tRq\n(K\x03U\x01<q\x0bNNNJ\xff\xff\xff\xff"
    b"J\xff\xff\xff\xffK\x00tq\x0cb\x89U\x04\x01\x00\x02\x01q\rtq\x0eb."
)


def some_arrays() -> dict[str, Any]:
    return {
        "grid": np.arange(6, dtype="<i2").reshape(2, 3, order="F"),
        "rows": np.arange(6.0).reshape(3, 2),
        "scalar": np.float32(1.5),
        "dtype": np.dtype(">u2"),
        "names": np.array(["a", "bc"]),
    }


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Any]:
    def read(content: bytes) -> Any:
        (tmp_path / "values.pkl").write_bytes(content)
        return load_safe_pickle(tmp_path / "values.pkl")

    return read


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_this_numpy(read: Callable[[bytes], Any], protocol: int) -> None:
    content = pickle.dumps(some_arrays(), protocol=protocol)
    module = np.ndarray.__reduce__(np.zeros(1))[0].__module__
    assert module.encode() in content or protocol == 5
    found = read(content)
    assert_same(found, some_arrays())
    found["rows"][0] = 1  # arrays can be written to


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_numpy_1(read: Callable[[bytes], Any], protocol: int) -> None:
    content = zipfile.ZipFile(NUMPY_1).read(f"protocol_{protocol}.pkl")
    assert b"numpy.core." in content
    assert b"numpy._core." not in content
    assert_same(read(content), some_arrays())


@pytest.mark.parametrize("protocol", [0, 1, *PROTOCOLS])
@pytest.mark.parametrize(
    "value",
    [
        {
            "a": [1, 2.5, None, True, "é", b"\xff\x00", 1 << 100, 1j],
            (1, "b"): {2, 3},
            "c": frozenset([4]),
            "d": range(3),
        },
        [bytearray(b"\x80ab"), b"", (), (1,), [[]], {}],
        [np.empty(0), np.zeros((0, 3), np.int32), np.array(7), np.array([True, False]), np.float16([1.5]), np.bool_(1)],
        [np.array([b"ab", b""]), np.array([1 + 2j]), np.array([1, 2], ">i8"), np.str_("ab"), np.int64(-5), np.uint8(9)],
    ],
)
def test_values_come_back_as_they_were(read: Callable[[bytes], Any], value: Any, protocol: int) -> None:
    assert_same(read(pickle.dumps(value, protocol=protocol)), value)


def test_shared_and_recursive_values_stay_so(read: Callable[[bytes], Any]) -> None:
    array = np.arange(3)
    inner: list[Any] = [array, np.dtype("i4")]
    inner.append(inner)
    found = read(pickle.dumps({"first": inner, "second": inner, "pair": (inner, array)}))
    assert found["first"] is found["second"] is found["pair"][0] is found["first"][2]
    assert found["first"][0] is found["pair"][1]
    assert_same(found["first"][:2], [array, np.dtype("i4")])


def test_a_small_file_of_many_references_is_read_quickly(read: Callable[[bytes], Any]) -> None:
    value: Any = ["x"]
    for _ in range(200):
        value = (value, value)  # 2 ** 200 paths to the end
    assert read(pickle.dumps(value))[0][1][0][1] is not None


DOUBLING = b"K\x01" + b"2\x86" * 40  # the last tuple of two holds 2 ** 40 values, and hashing does not know them again


@pytest.mark.parametrize("key", [DOUBLING, b"K\x01" + b"\x85" * 100_000], ids=["doubling", "nested"])
@pytest.mark.parametrize(
    "around",
    [b"}{}Ns", b"}({}Nu", b"({}Nd", b"\x8f({}\x90", b"({}\x91", b"cbuiltins\nset\n]{}a\x85R", b"}{}q\x000h\x00Ns"],
    ids=["item", "items", "dict", "set", "frozenset", "call", "memo"],
)
def test_a_key_that_takes_for_ever_to_hash_is_refused(read: Callable[[bytes], Any], key: bytes, around: bytes) -> None:
    with pytest.raises(ValueError, match="a key of more than 1000 values is refused"):
        read(b"\x80\x04" + around.replace(b"{}", key) + b".")


def test_python_2(read: Callable[[bytes], Any]) -> None:
    assert read(PYTHON_2) == {"name": "ab", "set": {1}, "number": 3}
    assert_same(read(PYTHON_2_ARRAY), np.array([1, 258], "<i2"))


class Caller:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts if self.parts[2] is not None else self.parts[:2]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Caller(os.system, "touch {marker}"), f"{os.system.__module__}.system"),
        (Caller(subprocess.Popen, ["touch", "{marker}"]), "(subprocess|commands).Popen"),
        (Caller(eval, "open('{marker}', 'w')"), "builtins.eval"),
        (Caller(exec, "open('{marker}', 'w')"), "builtins.exec"),
        (Caller(open, "{marker}", "w"), "_?io.open"),
        (Caller(getattr, "text", "upper"), "builtins.getattr"),
        (Caller(__import__, "antigravity"), "builtins.__import__"),
        (Caller(np.fromfile, "{marker}"), r"numpy\S*.fromfile"),
        (Caller(np.save, "{marker}", 1), r"numpy\S*.save"),
        (Caller(functools.partial, print), "functools.partial"),
        (Caller(collections.OrderedDict), "collections.OrderedDict"),
    ],
)
def test_a_call_is_refused_by_name_and_not_made(tmp_path: Path, call: Caller, name: str, protocol: int) -> None:
    marker = tmp_path / "marker"
    function, arguments, _ = call.parts
    filled = [value.format(marker=marker) if isinstance(value, str) else value for value in arguments]
    filled = [[word.format(marker=marker) for word in value] if isinstance(value, list) else value for value in filled]
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"imlist": [Caller(function, *filled)]}, protocol=protocol))
    with pytest.raises(ValueError, match=rf"evil\.pkl is not a pickle of plain .*refers to {name}, which is refused"):
        load_safe_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Path("a"), r"refers to pathlib\S*\.\w*Path, which is refused"),
        (np.array([{}], dtype=object), "numpy.dtype 'O8' is refused"),
        (np.zeros(2, dtype=[("a", "i4")]), "numpy.dtype 'V4' is refused"),
        (np.zeros(2, dtype="M8[s]"), "numpy.dtype 'M8' is refused"),
        (np.ma.masked_array([1, 2], [0, 1]), r"refers to numpy.ma.core._mareconstruct"),
        (np.zeros(2).view(np.recarray), r"refers to numpy\S*recarray"),
        (set, "a function or class as a value is refused"),
        ([np.dtype], "a function or class as a value is refused"),
        (Caller(bytes, 1 << 40), "bytes of a number or a range is refused"),
        (Caller(bytearray, 1 << 40), "bytearray of a number or a range is refused"),
        (Caller(set, range(1 << 40)), "set of a number or a range is refused"),
        (Caller(frozenset, range(1 << 40)), "frozenset of a number or a range is refused"),
        (Caller(np.ndarray, (3,)), "a call of numpy.ndarray is refused"),
        (Caller(np.dtype, "i4", state=(3, "<", None, ("a",), {"a": (np.dtype("u1"), 0)}, 1, 1, 0)), "records is refu"),
        (Caller(np.dtype, "O"), "numpy.dtype 'O' is refused"),
        (Caller(np.dtype, "i4", state=(3, "x", None, None, None, -1, -1, 0)), "unknown byte order 'x'"),
    ],
)
def test_other_values_are_refused(read: Callable[[bytes], Any], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(pickle.dumps(value, protocol=4))


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # A state for a class or function would change it for the whole process.
        (opcodes(b"cnumpy\ndtype\n", b"}b"), "changes a function or class"),
        (opcodes(b"c_codecs\nencode\n", b"N}\x86b"), "changes a function or class"),
        (opcodes(b"c_codecs\nencode\n", b"X\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R"), "encode to 'hex' is refused"),
        # numpy would make an array of objects whose addresses are the file's bytes.
        (opcodes(b"cnumpy\ndtype\n", b"U\x02O8\x85R"), "numpy.dtype 'O8' is refused"),
        (opcodes(b"cnumpy.core.multiarray\n_reconstruct\n", b"cbuiltins\nset\n\x85R"), "another class than numpy.nd"),
        (opcodes(b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n\x85R"), "an array without data"),
        (opcodes(b"cnumpy.core.numeric\n_frombuffer\n", b"U\x01aU\x02i1K\x01\x85\x87R"), "without plain data, dtype"),
        (opcodes(b"cbuiltins\nstr.upper\n"), "builtins.str.upper, which is refused"),
        (b"", "exhausted before seeing STOP"),
        (b"not a pickle", "is not a pickle"),
        (pickle.dumps(list(range(99)))[:40], "is not a pickle"),
        (opcodes(b"P1\n"), "is not a pickle"),
        (opcodes(b"\x82\x01"), "is not a pickle"),
        (opcodes(b"(" * 3), "is not a pickle"),
        (opcodes(b"]" * 20_000, b"a" * 19_999), "is not a pickle of plain values"),  # nested without end
    ],
)
def test_crafted_and_damaged_files(read: Callable[[bytes], Any], content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(content)


def test_a_wrong_length_is_an_error(read: Callable[[bytes], Any]) -> None:
    content = pickle.dumps(np.arange(4, dtype="<i4"), protocol=2)
    assert b"K\x04\x85" in content
    with pytest.raises(ValueError, match="cannot reshape array of size 4 into shape"):
        read(content.replace(b"K\x04\x85", b"K\x05\x85"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.pkl"):
        load_safe_pickle(tmp_path / "nothing.pkl")


def test_what_is_said_about_a_file_is_short(tmp_path: Path) -> None:
    """A name of a class, the size of an array or a place in the memo may be anything."""
    for content in (
        *(b"c" + b"a" * 1_000_000 + b"\nb\n.", b"\x80\x04]r\xff\xff\xff\x7f."),
        *(b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.", b"\x80\x04\x95" + b"\xff" * 7 + b"\x3fN."),
    ):
        (tmp_path / "evil.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="is not a pickle of plain values and arrays") as raised:
            load_safe_pickle(tmp_path / "evil.pkl")
        assert len(str(raised.value)) < 500 + len(str(tmp_path))
