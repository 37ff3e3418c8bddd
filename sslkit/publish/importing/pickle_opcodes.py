"""Check the pickle opcodes of a PyTorch checkpoint without executing any, before PyTorch reads it.

PyTorch's weights-only unpickler runs no code, but a file of 400 bytes can still make it allocate gigabytes of zeros, or
hash a tuple that nests itself 40 times. Only what a state dict needs is allowed: plain data, and tensors in storages
that are in the file.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sslkit.errors import UserError

MAX_BYTES = 2**24  # of opcodes; a large ViT with its optimizer has some 100 000
MAX_COUNT = 4_000_000
MAX_DIMS = 64
LEGACY_PARTS = 5  # pickles in the legacy format: magic number, version, machine, content, storage keys
ZIP_END_BYTES = 22  # of a zip file's last record, if it has no comment

ITEM_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage"), 1),
    "ComplexDoubleStorage": 16,
}
STORAGES = {f"torch.{name}": size for name, size in ITEM_BYTES.items()} | {"torch.storage.UntypedStorage": 1}
DTYPES = {str(value): value.itemsize for value in vars(torch).values() if isinstance(value, torch.dtype)}
DICTS = ("collections.OrderedDict", "collections.Counter")
REBUILDS = tuple(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter"))
PLAIN_CALLS = ("torch.Size", "torch.device", "torch.serialization._get_layout")
ALLOWED = {*STORAGES, *DTYPES, *DICTS, *REBUILDS, *PLAIN_CALLS}
# Opcodes that push their argument.
VALUES = ("NONE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")


def check_opcodes(file: Path) -> None:
    """Check that loading a checkpoint needs no more memory than its size and builds only tensors and plain data.

    Raises `UserError` if not; its message does not name the file. If the file is no checkpoint or is incomplete, raises
    errors of many types.
    """
    checker = _OpcodeChecker(file.stat().st_size)
    with file.open("rb") as stream:
        if stream.read(2) == b"PK":
            checker.check(io.BytesIO(_zipped_opcodes(file)))
            return
        stream.seek(0)
        start = io.BytesIO(stream.read(MAX_BYTES))
    for _ in range(LEGACY_PARTS):
        checker.check(start)


def _zipped_opcodes(file: Path) -> bytes:
    """The opcodes in a zip file. PyTorch does not compress, so a file that expands beyond its size is an attack."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or size > file.stat().st_size:
            raise UserError("its zip entries are compressed or larger than the file, which PyTorch never writes")
        # PyTorch finds the central directory by its offset, Python by its length; PyTorch ignores case.
        with file.open("rb") as stream:
            stream.seek(-ZIP_END_BYTES, io.SEEK_END)
            end = stream.read()
        offset = int.from_bytes(end[16:20], "little")
        names = [entry.filename.lower() for entry in entries]
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if end[:4] != b"PK\5\6" or offset not in (archive.start_dir, 2**32 - 1) or len({*names}) < len(names):
            raise UserError("its zip directory is ambiguous, which PyTorch never writes")
        if len(pickles) != 1 or pickles[0].file_size > MAX_BYTES:
            raise UserError(f"does not have exactly one data.pkl of at most {MAX_BYTES} bytes, as checkpoints have")
        # PyTorch writes the CRC-32 of every entry but does not check it.
        if damaged := archive.testzip():
            raise UserError(f"its entry {damaged:.100} is damaged or was altered (CRC-32): download the file again")
        return archive.read(pickles[0])


class _Dict:
    """Stands for a dictionary; its content does not matter."""


class _Opaque:
    """Stands for a checked tensor or parameter, or another value whose content does not matter."""


@dataclass(frozen=True)
class _Global:
    """Stands for an allowed class or function."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Stands for a storage: its size and that of its items in bytes."""

    num_bytes: int
    item_bytes: int


class _OpcodeChecker:
    """Follows the opcodes of a file with a stack of placeholders; its storages have at most ``limit`` bytes in all."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self.storages: dict[str, int] = {}  # size in bytes by key
        self.handlers: dict[str, _Handler] = {**_HANDLERS, "BINPERSID": self.storage}

    def check(self, stream: io.BytesIO) -> None:
        """Check the opcodes up to the end of one pickle."""
        stack, outer_stacks, memo = list[Any](), list[list[Any]](), dict[Any, Any]()
        for opcode, argument, _position in pickletools.genops(stream):
            self.count += 1
            if self.count > MAX_COUNT:
                raise UserError(f"has more than {MAX_COUNT} opcodes, which no state dict needs")
            if opcode.name == "MARK":
                outer_stacks.append(stack)
                stack = []
            elif opcode.name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif opcode.name in VALUES:
                stack.append(argument)
            elif opcode.name in self.handlers:
                items, taken = list[Any](), opcode.stack_before
                if pickletools.markobject in taken:
                    items, stack = stack, outer_stacks.pop()
                    taken = taken[: taken.index(pickletools.markobject)]
                items = _pop(stack, len(taken)) + items
                stack.append(self.handlers[opcode.name](items, argument))
            elif opcode.name not in ("PROTO", "STOP"):
                raise UserError(f"has the opcode {opcode.name}, which no state dict needs, so it was not loaded")

    def storage(self, items: list[Any], _argument: Any) -> _Storage:
        """The placeholder of a storage, after a check of its size."""
        [(word, kind, key, _location, count, *view)] = items
        known = word == "storage" and isinstance(kind, _Global) and kind.name in STORAGES
        _require(known, "a storage of unknown type")
        _require(isinstance(key, str) and _is_count(count), "a storage without key and length")
        item_bytes = STORAGES[kind.name]
        if self.storages.setdefault(key, count * item_bytes) != count * item_bytes:
            raise UserError(f"storage {key:.50} has two lengths")
        if sum(self.storages.values()) > self.limit:
            raise UserError("has tensors that are larger than the file")
        if view and view[0] is not None:
            _name, start, length = view[0]
            _require(_is_count(start) and _is_count(length) and start + length <= count, "a view beyond its storage")
            count = length
        return _Storage(count * item_bytes, item_bytes)


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("the stack is empty")
    start = len(stack) - count
    items = stack[start:]
    del stack[start:]
    return items


def _global(_items: list[Any], argument: str) -> _Global:
    name = ".".join(argument.split(" ", 1))
    if name not in ALLOWED:
        raise UserError(
            f"needs {name:.100}, which is more than tensors, so it was not loaded; if you trust the file, save its "
            "state dict alone and import that"
        )
    return _Global(name)


def _append(items: list[Any], _argument: Any) -> Any:
    target, *values = items
    _require(isinstance(target, list), "an append to something that is not a list")
    target.extend(values)
    return target


def _set_items(items: list[Any], _argument: Any) -> Any:
    target, *pairs = items
    _require(isinstance(target, _Dict), "an entry of something that is not a dictionary")
    for key in pairs[::2]:
        _check_key(key)
    return target


def _build(items: list[Any], _argument: Any) -> Any:
    target, state = items
    _require(isinstance(target, _Dict) and isinstance(state, _Dict), "attributes of a value that has none")
    return target


def _reduce(items: list[Any], _argument: Any) -> Any:
    function, arguments = items
    _require(isinstance(function, _Global) and isinstance(arguments, tuple), "a call of a value, not of a function")
    return _checked_call(function.name, arguments)


def _checked_call(name: str, arguments: tuple[Any, ...]) -> Any:
    """The placeholder for the result of an allowed call."""
    if name in DICTS:
        [given] = arguments or (_Dict(),)
        # Python 2 wrote a list of keys and values.
        pairs = given if isinstance(given, list) and name == DICTS[0] else []
        _require(isinstance(given, _Dict) or given is pairs, f"a {name} of other arguments")
        for pair in pairs:
            _require(isinstance(pair, list | tuple) and len(pair) == 2, f"a {name} without pairs")
            _check_key(pair[0])
        return _Dict()
    if name == "torch._utils._rebuild_parameter":
        _require(len(arguments) == 3 and isinstance(arguments[0], _Opaque), "a parameter without a tensor")
        return _Opaque()
    if name in REBUILDS:
        _check_tensor(name, arguments)
        return _Opaque()
    if name == "torch.Size":
        _require(len(arguments) == 1 and _are_counts(arguments[0]), "a size that is not a tuple of lengths")
        return arguments[0]
    _require(name in PLAIN_CALLS and all(isinstance(each, str | int) for each in arguments), f"a call of {name}")
    return _Opaque()


def _check_tensor(name: str, arguments: tuple[Any, ...]) -> None:
    """Check that a tensor is within its storage, which PyTorch would enlarge otherwise."""
    _require(len(arguments) >= 4, "a tensor with too few arguments")
    storage, offset, size, stride = arguments[:4]
    _require(isinstance(storage, _Storage), "a tensor without storage")
    _require(_is_count(offset) and _are_counts(size) and _are_counts(stride), "a tensor without sizes")
    _require(len(size) == len(stride) <= MAX_DIMS, "a tensor with too many dimensions")
    item_bytes = storage.item_bytes
    if name.endswith("_v3"):
        is_dtype = len(arguments) >= 7 and isinstance(arguments[6], _Global) and arguments[6].name in DTYPES
        _require(is_dtype, "an unknown dtype")
        item_bytes = DTYPES[arguments[6].name]
    if not math.prod(size):
        return
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if (last + 1) * item_bytes > storage.num_bytes:
        raise UserError("has tensors that are larger than the file's storages")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


def _check_key(key: Any) -> None:
    """Check a dictionary key. Nested tuples could take exponential time to hash, so they may hold plain values only."""
    parts = key if isinstance(key, tuple) else (key,)
    plain = all(isinstance(each, str | bytes | int | float | None) for each in parts)
    _require(plain, "a key that is neither text nor a number")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(f"contains {otherwise}, which no state dict does; it was not loaded")


_Handler = Callable[[list[Any], Any], Any]
# What an opcode pushes, from the values that it takes from the stack and its argument.
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), lambda items, _: tuple(items)),
    **dict.fromkeys(("APPEND", "APPENDS"), _append),
    **dict.fromkeys(("SETITEM", "SETITEMS"), _set_items),
    "NEWTRUE": lambda *_: True,
    "NEWFALSE": lambda *_: False,
    "EMPTY_LIST": lambda *_: [],
    "EMPTY_DICT": lambda *_: _Dict(),
    "EMPTY_SET": lambda *_: _Opaque(),
    "GLOBAL": _global,
    "REDUCE": _reduce,
    "BUILD": _build,
}
