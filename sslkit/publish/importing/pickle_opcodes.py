"""Check the pickle opcodes of a PyTorch checkpoint before PyTorch reads it.

PyTorch's weights-only unpickler runs no code, but a file of 400 bytes can still make it allocate gigabytes of zeros, or
hash a tuple that nests itself 40 times. Only what a state dict needs is allowed: plain data, and tensors in storages
that are in the file.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    *("NONE", "NEWTRUE", "NEWFALSE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
}


def check_opcodes(file: Path) -> None:
    """Check that loading a checkpoint needs no more memory than its size and builds only tensors and plain data.

    Raises:
        UserError: It does not. The message does not name the file.
        Exception: The file is no checkpoint or is incomplete; of many types.
    """
    storages: dict[str, int] = {}
    with file.open("rb") as stream:
        is_zip = stream.read(2) == b"PK"
        stream.seek(0)
        opcodes = io.BytesIO(_zipped_opcodes(file) if is_zip else stream.read(MAX_BYTES))
    for _ in range(1 if is_zip else LEGACY_PARTS):
        start = opcodes.tell()
        for count, (opcode, _argument, _position) in enumerate(pickletools.genops(opcodes)):
            if opcode.name not in OPCODES:
                raise UserError(f"has the opcode {opcode.name}, which no state dict needs, so it was not loaded")
            if count >= MAX_COUNT:
                raise UserError(f"has more than {MAX_COUNT} opcodes, which no state dict needs")
        opcodes.seek(start)
        _PlaceholderUnpickler(opcodes, storages, file.stat().st_size).load()


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
    """Stands for a dictionary. Its keys are checked, and its content is dropped."""

    def __setitem__(self, key: Any, _value: Any) -> None:
        _check_key(key)


class _Opaque:
    """Stands for a checked tensor or parameter, or another value whose content does not matter."""


@dataclass(frozen=True)
class _Storage:
    """Stands for a storage: its size and that of its items in bytes."""

    num_bytes: int
    item_bytes: int


@dataclass(frozen=True)
class _Global:
    """Stands for an allowed class or function. A call checks the arguments and returns a placeholder."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        return _checked_call(self.name, arguments)


class _PlaceholderUnpickler(pickle._Unpickler):
    """Python's unpickler, for a stream of `OPCODES`, with placeholders for all but plain data.

    ``storages`` has the size in bytes of each storage of the file by its key; together at most ``limit`` bytes.
    """

    stack: list[Any]

    def __init__(self, stream: io.BytesIO, storages: dict[str, int], limit: int) -> None:
        super().__init__(stream, encoding="utf-8")  # PyTorch's encoding of Python 2's strings
        self.storages, self.limit = storages, limit

    def find_class(self, module: str, name: str) -> _Global:
        if f"{module}.{name}" not in ALLOWED:
            raise UserError(
                f"needs {f'{module}.{name}':.100}, which is more than tensors, so it was not loaded; if you trust the "
                "file, save its state dict alone and import that"
            )
        return _Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        word, kind, key, _location, count, *view = pid
        known = word == "storage" and isinstance(kind, _Global) and kind.name in STORAGES
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
        return _Storage(count * item_bytes, item_bytes)

    def _push_dict(self) -> None:
        self.stack.append(_Dict())

    def _build(self) -> None:
        state = self.stack.pop()
        _require(isinstance(self.stack[-1], _Dict) and isinstance(state, _Dict), "attributes of a value that has none")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.EMPTY_DICT[0]: _push_dict,
        pickle.BUILD[0]: _build,
    }


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
        raise UserError("its tensors claim to be larger than the file's storages")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


def _check_key(key: Any) -> None:
    """Check a key, which is hashed: nested tuples could take forever."""
    parts = key if isinstance(key, tuple) else (key,)
    plain = all(isinstance(each, str | bytes | int | float | None) for each in parts)
    _require(plain, "a key that is neither text nor a number")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(f"asks for {otherwise}, which no state dict needs, so it was not loaded")
