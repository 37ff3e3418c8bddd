"""What a checkpoint of PyTorch asks its reader to do, found out by looking at its instructions without following one.

PyTorch's reader of weights runs no code, but does what it knows at a file's word: four hundred bytes may ask for
gigabytes of zeros, or for the hash of a tuple that holds itself forty times over. So every instruction is looked at
first, and only what a state dict needs is let through: plain data, and tensors that lie within storages that lie within
the file.
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

MAX_BYTES = 2**24  # of instructions; those of a large ViT with its optimizer are some hundred thousand bytes
MAX_COUNT = 4_000_000
MAX_AXES = 64
LEGACY_PARTS = 5  # magic number, version, machine, content, names of storages
ZIP_END = 22  # bytes of a zip's last record, where nothing is appended to it

ITEM_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage"), 1),
    "ComplexDoubleStorage": 16,
}
STORAGES = {f"torch.{name}": size for name, size in ITEM_BYTES.items()} | {"torch.storage.UntypedStorage": 1}
DTYPES = {str(value): value.itemsize for value in vars(torch).values() if isinstance(value, torch.dtype)}
TABLES = ("collections.OrderedDict", "collections.Counter")
REBUILT = tuple(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter"))
WORDS = ("torch.Size", "torch.device", "torch.serialization._get_layout")
KNOWN = {*STORAGES, *DTYPES, *TABLES, *REBUILT, *WORDS}


class Table:
    """A dictionary; what is in it does not matter."""


class Whole:
    """A tensor or parameter that lies within its storage, or another value that is done with."""


@dataclass(frozen=True)
class Named:
    """A class or function by name."""

    name: str


@dataclass(frozen=True)
class Stored:
    """A storage: its bytes, and those of an item."""

    num_bytes: int
    item_bytes: int


def check_instructions(file: Path) -> None:
    """See that reading a checkpoint takes no more than its own size, and builds nothing but tensors and plain data.

    Raises:
        UserError: It would, or it is torn; the sentence names what, not the file.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(2) == b"PK":
                _Reader(file.stat().st_size).go_through(io.BytesIO(_zipped_instructions(file)))
                return
            stream.seek(0)
            reader, start = _Reader(file.stat().st_size), io.BytesIO(stream.read(MAX_BYTES))
            for _ in range(LEGACY_PARTS):
                reader.go_through(start)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError, zipfile.BadZipFile, NotImplementedError) as e:
        raise UserError(f"not a checkpoint that can be read as weights, or torn ({str(e)[:150]})") from e


def _zipped_instructions(file: Path) -> bytes:
    """PyTorch stores, it never packs: an archive that would unfold to more than its own size is an attack."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or size > file.stat().st_size:
            raise UserError("its parts are packed or larger than the file, as PyTorch never writes them")
        # PyTorch's reader finds the list of parts by its offset, Python's by its length, and names in any case.
        with file.open("rb") as stream:
            stream.seek(-ZIP_END, io.SEEK_END)
            end = stream.read()
        offset = int.from_bytes(end[16:20], "little")
        names = [entry.filename.lower() for entry in entries]
        lists = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if end[:4] != b"PK\5\6" or offset not in (archive.start_dir, 2**32 - 1) or len({*names}) < len(names):
            raise UserError("its list of parts can be read in two ways, as PyTorch never writes it")
        if len(lists) != 1 or lists[0].file_size > MAX_BYTES:
            raise UserError(f"has not one list of tensors of at most {MAX_BYTES} bytes, as a checkpoint has")
        # PyTorch's reader does not look at the sums that its writer puts beside every part.
        if torn := archive.testzip():
            raise UserError(f"its part {torn:.100} is not what was written (CRC-32): torn or altered; get it again")
        return archive.read(lists[0])


@dataclass
class _Reader:
    """Goes through instructions with a stack of what they would make.

    Attributes:
        limit: Bytes that all storages may have together.
        storages: Bytes of each by its key.
        count: Instructions so far.
    """

    limit: int
    storages: dict[str, int] = field(default_factory=dict)
    count: int = 0
    stack: list[Any] = field(default_factory=list)
    below: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def go_through(self, stream: io.BytesIO) -> None:
        """One list of instructions, up to its end."""
        self.stack, self.below, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(stream):
            self.count += 1
            follow = _FOLLOW.get(opcode.name)
            if follow is None:
                raise UserError(f"holds the instruction {opcode.name}, which no state dict needs, so it was not read")
            if self.count > MAX_COUNT:
                raise UserError(f"holds more than {MAX_COUNT} instructions, which no state dict needs")
            follow(self, argument)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _argument: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        """What lies above the mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def name(self, argument: str) -> None:
        name = ".".join(argument.split(" ", 1))
        if name not in KNOWN:
            raise _more_than_tensors(name)
        self.push(Named(name))

    def append(self, items: list[Any]) -> None:
        _expect(isinstance(self.stack[-1], list), "an item of what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        _expect(isinstance(self.stack[-1], Table), "an entry of what is no dictionary")
        _check_keys(items[::2])

    def build(self, _argument: Any) -> None:
        [state] = self.pop(1)
        _expect(isinstance(self.stack[-1], Table) and isinstance(state, Table), "attributes of what has none")

    def reduce(self, _argument: Any) -> None:
        function, arguments = self.pop(2)
        _expect(isinstance(function, Named) and isinstance(arguments, tuple), "a call of what is no function")
        self.push(_called(function.name, arguments))

    def storage(self, _argument: Any) -> None:
        [(word, kind, key, _place, count, *view)] = self.pop(1)
        _expect(word == "storage" and isinstance(kind, Named) and kind.name in STORAGES, "a storage of no known type")
        _expect(isinstance(key, str) and _is_count(count), "a storage without name and length")
        item_bytes = STORAGES[kind.name]
        if self.storages.setdefault(key, count * item_bytes) != count * item_bytes:
            raise UserError(f"storage {key:.50} has two lengths")
        if sum(self.storages.values()) > self.limit:
            raise UserError("its tensors claim to be larger than the file")
        if view and view[0] is not None:
            _name, start, part = view[0]
            _expect(_is_count(start) and _is_count(part) and start + part <= count, "a part beyond its storage")
            count = part
        self.push(Stored(count * item_bytes, item_bytes))


def _called(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a call would make, where it is harmless."""
    if name in TABLES:
        given = arguments[0] if len(arguments) == 1 else Table()
        _expect(len(arguments) <= 1 and isinstance(given, Table | list), f"a {name} of something else")
        # As Python 2 wrote it: a list of keys and values.
        pairs = given if isinstance(given, list) and name == TABLES[0] else []
        _expect(isinstance(given, Table) or given is pairs, f"a {name} of something else")
        _expect(all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs), f"a {name} of no pairs")
        _check_keys(pair[0] for pair in pairs)
        return Table()
    if name == "torch._utils._rebuild_parameter":
        _expect(len(arguments) == 3 and isinstance(arguments[0], Whole), "a parameter of no tensor")
        return Whole()
    if name in REBUILT:
        _check_tensor(name, arguments)
        return Whole()
    if name == "torch.Size":
        _expect(len(arguments) == 1 and _are_counts(arguments[0]), "a size that is none")
        return arguments[0]
    _expect(name in WORDS and all(isinstance(each, str | int) for each in arguments), f"a call of {name}")
    return Whole()


def _check_tensor(name: str, arguments: tuple[Any, ...]) -> None:
    """A tensor must lie within its storage: PyTorch would let the storage grow."""
    _expect(len(arguments) >= 4, "a tensor of too little")
    storage, offset, size, stride = arguments[:4]
    _expect(isinstance(storage, Stored), "a tensor without storage")
    _expect(_is_count(offset) and _are_counts(size) and _are_counts(stride), "a tensor without sizes")
    _expect(len(size) == len(stride) <= MAX_AXES, "a tensor of too many axes")
    item_bytes = storage.item_bytes
    if name.endswith("_v3"):
        _expect(
            len(arguments) >= 7 and isinstance(arguments[6], Named) and arguments[6].name in DTYPES,
            "a type of no numbers",
        )
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
    """A key is hashed: of a tuple of tuples that may take for ever."""
    for key in keys:
        flat = key if isinstance(key, tuple) else (key,)
        plain = all(isinstance(each, str | bytes | int | float | None) for each in flat)
        _expect(plain, "a key that is neither a word nor a number")


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise UserError(f"asks for {otherwise}, which no state dict needs, so it was not read")


def _more_than_tensors(name: str) -> UserError:
    return UserError(
        f"needs {name:.100} to be read, which is more than tensors, so it was not read; where you trust it, save its "
        "state dict alone and import that"
    )


def _refuse_objects(reader: _Reader, _argument: Any) -> None:
    kind = reader.pop(2)[0]
    raise _more_than_tensors(f"an object of {kind.name}" if isinstance(kind, Named) else "an object")


def _remember(reader: _Reader, place: int) -> None:
    reader.memo[place] = reader.stack[-1]


_Follow = Callable[[_Reader, Any], None]
_FOLLOW: dict[str, _Follow] = {
    **dict.fromkeys(("PROTO", "STOP"), lambda reader, argument: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), _Reader.push
    ),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_DICT": lambda reader, _: reader.push(Table()),
    "EMPTY_SET": lambda reader, _: reader.push(Whole()),
    "MARK": _Reader.mark,
    "TUPLE": lambda reader, _: reader.push(tuple(reader.items())),
    "TUPLE1": lambda reader, _: reader.push(tuple(reader.pop(1))),
    "TUPLE2": lambda reader, _: reader.push(tuple(reader.pop(2))),
    "TUPLE3": lambda reader, _: reader.push(tuple(reader.pop(3))),
    "APPEND": lambda reader, _: reader.append(reader.pop(1)),
    "APPENDS": lambda reader, _: reader.append(reader.items()),
    "SETITEM": lambda reader, _: reader.set_items(reader.pop(2)),
    "SETITEMS": lambda reader, _: reader.set_items(reader.items()),
    "BINGET": lambda reader, place: reader.push(reader.memo[place]),
    "LONG_BINGET": lambda reader, place: reader.push(reader.memo[place]),
    "BINPUT": _remember,
    "LONG_BINPUT": _remember,
    "GLOBAL": _Reader.name,
    "REDUCE": _Reader.reduce,
    "BUILD": _Reader.build,
    "BINPERSID": _Reader.storage,
    "NEWOBJ": _refuse_objects,
}
