"""Damage to files, drawn from a generator: bits, bytes, JSON trees, tensors, archives, and files that are none."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator

WORDS = [
    "", "text", "euler", "nan", "1e400", "-1", "../../etc/passwd", "/dev/zero", "antigravity:X-v0", "a.b", "forward",
    "keys", "\0", "\ud800", "two\nlines", "\x1b[31m", "x" * 100_000, "%s%n", "{}", "cuda", "meta", "none", "minmax",
]  # fmt: skip
NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 7, 100, 999, 1023, 1024, 1025, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, 10**4000,
    0.0, -0.0, 0.5, 1.5, -1.5, 1e-300, 5e-324, 1e6, 1e9, 1e38, 3.5e38, 1e300, 1.7e308, -1.7e308,
    float("nan"), float("inf"), float("-inf"), True, False, None,
]  # fmt: skip


def pick(rng: Rng, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


# Bytes ---------------------------------------------------------------------------------------------------------------


def damaged_bytes(data: bytes, rng: Rng) -> bytes:
    """Flipped bits, a part cut off, zeroed, doubled, replaced by noise, or too much at the end."""
    at = int(rng.integers(len(data) + 1))
    length = int(rng.integers(1, 65))
    kind = int(rng.integers(7))
    if kind <= 1:
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 20))):
            changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    return [
        data[:at],
        data[:at] + bytes(length) + data[at + length :],
        data[:at] + data[max(0, at - length) :],
        data[:at] + rng.bytes(length) + data[at + length :],
        data + rng.bytes(int(rng.integers(1, 10_000))),
    ][kind - 2]


# JSON ----------------------------------------------------------------------------------------------------------------


def damaged_json(text: str, rng: Rng) -> bytes:
    """A tree in which one to three places hold something else; or nested, repeated, or too large a text."""
    content = json.loads(text)
    kind = int(rng.integers(12))
    if kind == 0:
        depth = int(pick(rng, [33, 200, 990, 10_000, 100_000]))
        opening, closing = pick(rng, [("[", "]"), ('{"a":', "}")])
        nested = opening * depth + ("1" if opening != "[" else "") + closing * depth
        return _with_text(content, rng, nested).encode()
    if kind == 1:
        key = pick(rng, sorted(content))
        return text.replace("{", "{" + json.dumps(key) + ": " + json.dumps(content[key]) + ",", 1).encode()
    if kind == 2:
        return _with_text(
            content, rng, "[" + "[]," * int(pick(rng, [1000, 660_000, 4_000_000])) + "1]"
        ).encode()
    if kind == 3:
        return json.dumps(pick(rng, [[content], None, 3, "text", True, [], {}])).encode()
    for _ in range(int(rng.integers(1, 4))):
        _change(content, rng)
    return _encoded(content)


def _encoded(content: Any) -> bytes:
    limit = 4300
    text = json.dumps(_short(content, limit))
    return text.replace(f'"<{limit}>"', "1" + "0" * (limit - 1)).encode("utf-8", "surrogatepass")


def _short(value: Any, limit: int) -> Any:
    """Numbers that Python does not write out by itself stand as a mark."""
    if isinstance(value, dict):
        return {str(key): _short(item, limit) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item, limit) for item in value]
    return (
        f"<{limit}>" if isinstance(value, int) and not isinstance(value, bool) and value > 10**300 else value
    )


def _with_text(content: Any, rng: Rng, text: str) -> str:
    _replace(content, rng, "<here>")
    return json.dumps(content).replace('"<here>"', text, 1)


def _places(node: Any) -> list[tuple[Any, Any]]:
    found = [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
    for container, key in list(found):
        if isinstance(container[key], (dict, list)):
            found += _places(container[key])
    return found


def _replace(content: Any, rng: Rng, value: Any) -> None:
    places = _places(content)
    if places:
        container, key = pick(rng, places)
        container[key] = value


def _change(content: Any, rng: Rng) -> None:
    places = _places(content)
    if not places:
        return
    container, key = pick(rng, places)
    kind = int(rng.integers(7))
    if kind <= 2:
        container[key] = pick(rng, NUMBERS)
    elif kind == 3:
        container[key] = pick(rng, WORDS)
    elif kind == 4:
        container[key] = pick(
            rng, [[], {}, [1], [container[key]], {"a": container[key]}, [None] * 50, [1, "x"]]
        )
    elif kind == 5 and isinstance(container, dict):
        container[pick(rng, WORDS)] = container.pop(key)
    elif isinstance(container, dict):
        del container[key]
    else:
        container.append(pick(rng, NUMBERS))


# Tensors -------------------------------------------------------------------------------------------------------------


def damaged_tensors(data: bytes, rng: Rng) -> bytes:
    """A safetensors file with other numbers, shapes, types or names, or another header."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    kind = int(rng.integers(8))
    if kind == 0:
        size = int(pick(rng, [0, 1, 2**31, 2**63, 2**64 - 1, len(data), length + 1]))
        return struct.pack("<Q", size) + data[8:]
    if kind == 1:
        return joined(damaged_json(json.dumps(header), rng), bytes(body))
    names = sorted(name for name in header if name != "__metadata__")
    name = pick(rng, names)
    entry = header[name]
    start, end = entry["data_offsets"]
    if kind == 2:
        entry["shape"] = pick(
            rng, [[], [0], [2**40], [2**31, 2**31], entry["shape"] + [1], [-1], [1.5], None]
        )
    elif kind == 3:
        entry["dtype"] = pick(
            rng, ["F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "C64", "F8_E4M3", "X", 3]
        )
    elif kind == 4:
        header[pick(rng, [*names, *WORDS[:12]])] = header.pop(name)
    elif kind == 5:
        numbers = np.frombuffer(bytes(body[start:end]), np.uint8).copy()
        values = numbers[: len(numbers) // 4 * 4].view("<f4")
        values[...] = pick(rng, [np.nan, np.inf, -np.inf, 3e38, -3e38, -1.0, 0.0, 1e-45, 1e-38, 1e20])
        body[start : start + values.nbytes] = values.tobytes()
    elif kind == 6:
        wide = np.full((end - start) // 4, pick(rng, [1e300, -1e300, 1.0])).astype("<f8").tobytes()
        shift = len(wide) - (end - start)
        body[start:end] = wide
        for other in names:
            if other != name and header[other]["data_offsets"][0] >= end:
                header[other]["data_offsets"] = [offset + shift for offset in header[other]["data_offsets"]]
        header[name] = {**entry, "dtype": "F64", "data_offsets": [start, start + len(wide)]}
    else:
        return joined(json.dumps(header).encode(), damaged_bytes(bytes(body), rng))
    return joined(_encoded(header), bytes(body))


def joined(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


# Archives ------------------------------------------------------------------------------------------------------------


def damaged_archive(data: bytes, rng: Rng) -> bytes:
    """A zip with damaged members, or one that is a bomb, encrypted, packed otherwise or holds something else."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    kind = int(rng.integers(10))
    method = zipfile.ZIP_STORED
    if kind <= 3:
        index = int(kind % 2)
        name, content = members[index]
        changed = damaged_json(content.decode(), rng) if index == 0 else damaged_tensors(content, rng)
        members[index] = (name, changed)
    elif kind == 4:
        method = pick(rng, [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
        index = int(rng.integers(2))
        members[index] = (members[index][0], members[index][1] + bytes(int(pick(rng, [0, 10**6, 10**8]))))
    elif kind == 5:
        members.append((pick(rng, ["../../evil", "config.json", "extra", "/abs"]), b"x"))
    elif kind == 6:
        members += [(f"{number}", b"") for number in range(int(pick(rng, [100, 20_000])))]
    elif kind == 7:
        members.pop(int(rng.integers(2)))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    packed = stream.getvalue()
    if kind == 8:  # the flag that says a member is encrypted, in both places
        for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            at = packed.find(mark) + offset
            packed = packed[:at] + bytes([packed[at] | 1]) + packed[at + 1 :]
    return damaged_bytes(packed, rng) if kind == 9 else packed


# Files ---------------------------------------------------------------------------------------------------------------


def odd_file(path: Path, rng: Rng) -> None:
    """Something else in the place of a file."""
    path.unlink()
    kind = int(rng.integers(8))
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(pick(rng, ["/dev/zero", "/dev/full", "/dev/null", "/dev/random", "/proc/self/mem"]))
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to(path)
    elif kind == 4:
        with path.open("wb") as file:
            file.truncate(4 << 30)
    elif kind == 5:
        path.write_bytes(b"")
    elif kind == 6:
        path.write_bytes(rng.bytes(int(pick(rng, [1, 8, 100, 100_000]))))


Damage = Callable[[Path, Rng], None]


def rewritten(change: Callable[[bytes, Rng], bytes]) -> Damage:
    """Damage to the content of a file."""
    return lambda path, rng: path.write_bytes(change(path.read_bytes(), rng)) and None


BYTES = rewritten(damaged_bytes)
JSON = rewritten(lambda data, rng: damaged_json(data.decode(), rng))
TENSORS = rewritten(damaged_tensors)
ARCHIVE = rewritten(damaged_archive)
