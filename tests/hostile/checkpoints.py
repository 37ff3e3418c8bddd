"""Malicious PyTorch checkpoints, made to run code or to use much memory or time. Nothing here reads them."""

import io
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch._utils import _rebuild_device_tensor_from_cpu_tensor, _rebuild_tensor_v2

GIGABYTES = 3_000_000_000


class Call:
    """Pickled as a call of ``function`` with ``arguments``, which unpickling would execute."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.stored = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.stored


def saved(content: Any, *, old: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not old)
    return stream.getvalue()


def zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return stream.getvalue()


def instructed(instructions: bytes) -> bytes:
    """A checkpoint whose pickle consists of these opcodes."""
    return zipped({"x/data.pkl": b"\x80\x02" + instructions, "x/version": b"3\n"})


def patched(content: bytes, before: bytes, after: bytes, count: int = -1) -> bytes:
    """A checkpoint with other pickle opcodes, in either format."""
    if content[:2] != b"PK":
        return content.replace(before, after, count)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return zipped({name: archive.read(name).replace(before, after, count) for name in archive.namelist()})


def longer(numbers: int, *, old: bool) -> bytes:
    """A tensor of a thousand numbers that declares another size."""
    return patched(saved({"a": torch.zeros(1000)}, old=old), b"M\xe8\x03", b"J" + struct.pack("<i", numbers))


def overlapping() -> bytes:
    """An archive with two entries that share their bytes."""
    whole = bytearray(zipped({"x/data.pkl": b"\x80\x02}.", "x/data/0": bytes(4000), "x/data/1": b""}))
    at = whole.rfind(b"PK\1\2")
    first = whole.find(b"PK\1\2", whole.find(b"PK\1\2") + 1)
    whole[at + 20 : at + 28] = struct.pack("<II", 4000, 4000)
    whole[at + 42 : at + 46] = whole[first + 42 : first + 46]
    return bytes(whole)


def two_lists() -> bytes:
    """An archive with a second central directory, at another offset than its end record states."""
    good, other = instructed(b"}."), instructed(b"}(X\1\0\0\0aK\1u.")
    return good[:-22] + other


def doubled_hash() -> bytes:
    """A dictionary whose key is a tuple of a tuple twice, and so on forty times."""
    return instructed(b"})" + b"".join(b"q%ch%c\x86" % (index, index) for index in range(40)) + b"K\1s.")


ONE = torch.zeros(1)
BEYOND = _rebuild_tensor_v2, ONE.untyped_storage(), 0, (GIGABYTES // 4,), (1,), False, OrderedDict()
# Its hexadecimal digits, of which there are twice as many, and so on thirty times.
DOUBLED = b"c_codecs\nencode\nq\0" + b"(h\0" * 30 + b"(X\1\0\0\0aX\6\0\0\0latin1tR" + b"X\3\0\0\0hextR" * 30


def hostile_checkpoints() -> dict[str, tuple[bytes, str]]:
    """By name: the file, and part of the message that refuses it."""
    wide = ONE.expand(GIGABYTES)
    typed = torch.storage.TypedStorage(wrap_storage=ONE.untyped_storage(), dtype=torch.float32, _internal=True)
    beyond = Call(BEYOND[0], typed, *BEYOND[2:])
    calls = {
        "zeros": (Call(bytearray, GIGABYTES), "bytearray, which is more than tensors"),
        "a tensor beyond its storage": (beyond, "larger than the file"),
        "a tensor far off": (Call(BEYOND[0], typed, GIGABYTES // 4, (1,), (1,), *BEYOND[5:]), "larger than the file"),
        "a copy of what is wide": (
            Call(_rebuild_device_tensor_from_cpu_tensor, wide, torch.float64, "cpu", False),
            "needs torch._utils._rebuild_device_tensor_from_cpu_tensor",
        ),
        "a storage": (Call(torch.UntypedStorage, GIGABYTES), "contains a call of torch"),
        "a set": (Call(set, [1, 2]), "set, which is more than tensors"),
    }
    files = {
        f"{name}, {'old' if old else 'new'}": (saved({"state_dict": {"a": ONE}, "x": call}, old=old), words)
        for name, (call, words) in calls.items()
        for old in (False, True)
    }
    return files | {
        "longer, new": (longer(GIGABYTES // 4, old=False), "larger than the file"),
        "longer, old": (longer(GIGABYTES // 4, old=True), "larger than the file"),
        "an object": (instructed(b"ccollections\nOrderedDict\n)\x81."), "the opcode NEWOBJ"),
        "a tensor of nothing": (instructed(b"ctorch\nFloatTensor\nJ\0\0\0\x7f\x85R."), "needs torch.FloatTensor"),
        "a word that doubles": (instructed(DOUBLED + b"."), "needs _codecs.encode, which"),
        "a key without end": (doubled_hash(), "a key that is neither text nor a number"),
        "an import by words": (instructed(b"X\5\0\0\0posixX\6\0\0\0system\x93."), "the opcode STACK_GLOBAL"),
        "packed": (
            zipped({"x/data.pkl": b"\x80\x02}.", "x/data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED),
            "compressed or larger",
        ),
        "overlapping": (overlapping(), "compressed or larger"),
        "two lists of parts": (two_lists(), "is ambiguous"),
        "two lists of tensors": (
            zipped({"x/data.pkl": b"\x80\x02}.", "y/Data.pkl": b"\x80\x02}."}),
            "exactly one data.pkl",
        ),
        "one name twice": (zipped({"x/data.pkl": b"\x80\x02}.", "x/a": b"", "x/A": b""}), "is ambiguous"),
        "no list": (zipped({"x/version": b"3\n"}), "exactly one data.pkl"),
        "a long list": (instructed(b"}0" * 2**23 + b"."), "exactly one data.pkl"),
        "an empty archive": (zipped({}), "exactly one data.pkl|not a checkpoint"),
        "PK": (b"PK", "not a checkpoint"),
        "nothing": (b"", "not a checkpoint"),
        "marks": (instructed(b"(" * 4_000_001), "more than 4000000 opcodes"),
        "nothing to take": (instructed(b"\x85."), "not a checkpoint"),
        "nothing remembered": (instructed(b"h\7."), "not a checkpoint"),
        "an entry of a number": (instructed(b"K\1K\2K\3s."), "an entry of something that is not a dictionary"),
        "an item of a number": (instructed(b"K\1K\2a."), "an append to something that is not a list"),
        "a storage of a word": (instructed(b"X\1\0\0\0aQ."), "not a checkpoint"),
        "an endless word": (instructed(b"X\xff\xff\xff\xffabc"), "not a checkpoint"),
        "an endless number": (instructed(b"\x8b\xff\xff\xff\x7fabc"), "not a checkpoint"),
    }
