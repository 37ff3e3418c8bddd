"""Check the pickle opcodes of a PyTorch checkpoint without executing any.

PyTorch's weights-only unpickler runs no code, but a file of 400 bytes can still make it allocate gigabytes of zeros, or
hash a tuple that nests itself 40 times. So all opcodes are checked first. Only those that a state dict needs are
allowed: plain data, and tensors within storages that are within the file.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
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


class Dict:
    """Stands for a dictionary; its content does not matter."""


class Opaque:
    """Stands for a checked tensor or parameter, or another value whose content does not matter."""


@dataclass(frozen=True)
class Global:
    """A class or function by name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Size of a storage and of its items in bytes."""

    num_bytes: int
    item_bytes: int


def check_opcodes(file: Path) -> None:
    """Check that loading a checkpoint needs no more memory than its size and builds only tensors and plain data.

    Raises:
        UserError: It does not, or the file is incomplete. The message does not name the file.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(2) == b"PK":
                _OpcodeChecker(file.stat().st_size).check(io.BytesIO(_zipped_opcodes(file)))
                return
            stream.seek(0)
            checker, start = _OpcodeChecker(file.stat().st_size), io.BytesIO(stream.read(MAX_BYTES))
            for _ in range(LEGACY_PARTS):
                checker.check(start)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError, zipfile.BadZipFile, NotImplementedError) as e:
        reason = str(e)[:150]
        raise UserError(f"is not a checkpoint that can be read as weights, or is incomplete ({reason})") from e


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


@dataclass
class _OpcodeChecker:
    """Follows the opcodes with a stack of placeholders for the values.

    Attributes:
        limit: Maximum size of all storages together in bytes.
        storages: Size in bytes of each storage by its key.
        count: Number of opcodes so far.
        stack: Placeholders above the last mark.
        outer_stacks: Those below each mark.
        memo: Memoised placeholders.
    """

    limit: int
    storages: dict[str, int] = field(default_factory=dict)
    count: int = 0
    stack: list[Any] = field(default_factory=list)
    outer_stacks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def check(self, stream: io.BytesIO) -> None:
        """Check the opcodes up to the end of one pickle."""
        self.stack, self.outer_stacks, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(stream):
            self.count += 1
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise UserError(f"has the opcode {opcode.name}, which no state dict needs, so it was not loaded")
            if self.count > MAX_COUNT:
                raise UserError(f"has more than {MAX_COUNT} opcodes, which no state dict needs")
            handler(self, argument)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _argument: Any) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer_stacks.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def memoise(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def push_global(self, argument: str) -> None:
        name = ".".join(argument.split(" ", 1))
        if name not in ALLOWED:
            raise _more_than_tensors(name)
        self.push(Global(name))

    def append(self, items: list[Any]) -> None:
        _require(isinstance(self.stack[-1], list), "an append to something that is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        _require(isinstance(self.stack[-1], Dict), "an entry of something that is not a dictionary")
        _check_keys(items[::2])

    def build(self, _argument: Any) -> None:
        [state] = self.pop(1)
        _require(isinstance(self.stack[-1], Dict) and isinstance(state, Dict), "attributes of a value that has none")

    def reduce(self, _argument: Any) -> None:
        function, arguments = self.pop(2)
        _require(isinstance(function, Global) and isinstance(arguments, tuple), "a call of a value, not of a function")
        self.push(_checked_call(function.name, arguments))

    def new_object(self, _argument: Any) -> None:
        kind = self.pop(2)[0]
        raise _more_than_tensors(f"an object of {kind.name}" if isinstance(kind, Global) else "an object")

    def storage(self, _argument: Any) -> None:
        [(word, kind, key, _location, count, *view)] = self.pop(1)
        known = word == "storage" and isinstance(kind, Global) and kind.name in STORAGES
        _require(known, "a storage of unknown type")
        _require(isinstance(key, str) and _is_count(count), "a storage without key and length")
        item_bytes = STORAGES[kind.name]
        if self.storages.setdefault(key, count * item_bytes) != count * item_bytes:
            raise UserError(f"storage {key:.50} has two lengths")
        if sum(self.storages.values()) > self.limit:
            raise UserError("its tensors claim to be larger than the file")
        if view and view[0] is not None:
            _name, start, length = view[0]
            _require(_is_count(start) and _is_count(length) and start + length <= count, "a view beyond its storage")
            count = length
        self.push(Storage(count * item_bytes, item_bytes))


def _checked_call(name: str, arguments: tuple[Any, ...]) -> Any:
    """The placeholder for the result of an allowed call."""
    if name in DICTS:
        given = arguments[0] if len(arguments) == 1 else Dict()
        _require(len(arguments) <= 1 and isinstance(given, Dict | list), f"a {name} of other arguments")
        # Python 2 wrote a list of keys and values.
        pairs = given if isinstance(given, list) and name == DICTS[0] else []
        _require(isinstance(given, Dict) or given is pairs, f"a {name} of other arguments")
        _require(all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs), f"a {name} without pairs")
        _check_keys(pair[0] for pair in pairs)
        return Dict()
    if name == "torch._utils._rebuild_parameter":
        _require(len(arguments) == 3 and isinstance(arguments[0], Opaque), "a parameter without a tensor")
        return Opaque()
    if name in REBUILDS:
        _check_tensor(name, arguments)
        return Opaque()
    if name == "torch.Size":
        _require(len(arguments) == 1 and _are_counts(arguments[0]), "a size that is not a tuple of lengths")
        return arguments[0]
    _require(name in PLAIN_CALLS and all(isinstance(each, str | int) for each in arguments), f"a call of {name}")
    return Opaque()


def _check_tensor(name: str, arguments: tuple[Any, ...]) -> None:
    """Check that a tensor is within its storage, which PyTorch would enlarge otherwise."""
    _require(len(arguments) >= 4, "a tensor with too few arguments")
    storage, offset, size, stride = arguments[:4]
    _require(isinstance(storage, Storage), "a tensor without storage")
    _require(_is_count(offset) and _are_counts(size) and _are_counts(stride), "a tensor without sizes")
    _require(len(size) == len(stride) <= MAX_DIMS, "a tensor with too many dimensions")
    item_bytes = storage.item_bytes
    if name.endswith("_v3"):
        is_dtype = len(arguments) >= 7 and isinstance(arguments[6], Global) and arguments[6].name in DTYPES
        _require(is_dtype, "an unknown dtype")
        item_bytes = DTYPES[arguments[6].name]
    if not math.prod(size):
        return
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if (last + 1) * item_bytes > storage.num_bytes:
        raise UserError("its tensors claim to be larger than the file's storages")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


def _check_keys(keys: Iterable[Any]) -> None:
    """Check keys, which are hashed: nested tuples could take forever."""
    for key in keys:
        parts = key if isinstance(key, tuple) else (key,)
        plain = all(isinstance(each, str | bytes | int | float | None) for each in parts)
        _require(plain, "a key that is neither text nor a number")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(f"asks for {otherwise}, which no state dict needs, so it was not loaded")


def _more_than_tensors(name: str) -> UserError:
    return UserError(
        f"needs {name:.100}, which is more than tensors, so it was not loaded; if you trust the file, save its state "
        "dict alone and import that"
    )


_Handler = Callable[[_OpcodeChecker, Any], None]
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("PROTO", "STOP"), lambda checker, argument: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), _OpcodeChecker.push
    ),
    "NONE": lambda checker, _: checker.push(None),
    "NEWTRUE": lambda checker, _: checker.push(True),
    "NEWFALSE": lambda checker, _: checker.push(False),
    "EMPTY_TUPLE": lambda checker, _: checker.push(()),
    "EMPTY_LIST": lambda checker, _: checker.push([]),
    "EMPTY_DICT": lambda checker, _: checker.push(Dict()),
    "EMPTY_SET": lambda checker, _: checker.push(Opaque()),
    "MARK": _OpcodeChecker.mark,
    "TUPLE": lambda checker, _: checker.push(tuple(checker.pop_to_mark())),
    "TUPLE1": lambda checker, _: checker.push(tuple(checker.pop(1))),
    "TUPLE2": lambda checker, _: checker.push(tuple(checker.pop(2))),
    "TUPLE3": lambda checker, _: checker.push(tuple(checker.pop(3))),
    "APPEND": lambda checker, _: checker.append(checker.pop(1)),
    "APPENDS": lambda checker, _: checker.append(checker.pop_to_mark()),
    "SETITEM": lambda checker, _: checker.set_items(checker.pop(2)),
    "SETITEMS": lambda checker, _: checker.set_items(checker.pop_to_mark()),
    "BINGET": lambda checker, index: checker.push(checker.memo[index]),
    "LONG_BINGET": lambda checker, index: checker.push(checker.memo[index]),
    "BINPUT": _OpcodeChecker.memoise,
    "LONG_BINPUT": _OpcodeChecker.memoise,
    "GLOBAL": _OpcodeChecker.push_global,
    "REDUCE": _OpcodeChecker.reduce,
    "BUILD": _OpcodeChecker.build,
    "BINPERSID": _OpcodeChecker.storage,
    "NEWOBJ": _OpcodeChecker.new_object,
}
