"""PNG chunks that describe colours, of which OpenCV uses none."""

import struct

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK = struct.Struct(">I4s")
PROFILES = (b"iCCP", b"cHRM")


def without_profile(encoded: bytes) -> bytes:
    """Remove colour profiles from a PNG; other bytes are returned as they are.

    libpng writes a line to standard error for each image whose profile is wrong, such as one of RGB in a grey image.
    OpenCV ignores profiles, so the pixels are the same.
    """
    if encoded[:8] != SIGNATURE:
        return encoded
    kept, at, start = [], 8, 0
    while at + 12 <= len(encoded):
        size, kind = CHUNK.unpack_from(encoded, at)
        if kind == b"IDAT":
            break
        if kind in PROFILES:
            kept.append(encoded[start:at])
            start = at + 12 + size
        at += 12 + size
    return b"".join([*kept, encoded[start:]]) if kept else encoded
