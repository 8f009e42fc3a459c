"""A stand-in for an SO-101 arm with two cameras, for lerobot's own driver: benchmarks/lerobot_robot.py.

The six servos answer Feetech's protocol on a pseudo-terminal, from a process of their own: lerobot's
``so101_follower`` opens it as any serial port. Now and then a reply is late, garbled or missing, or the whole bus
is silent. Every goal position that arrives is kept with its time. The cameras are registered with lerobot as type
``double`` when this module is imported; they show a picture of 60 ms ago, and freeze now and then.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import time
import tty
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.control.system import real_time_priority

try:
    from lerobot.cameras import Camera, CameraConfig
except ImportError:  # the servos need no lerobot
    Camera, CameraConfig = object, None

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
MIDDLE, REACH = 2048, 1024
"""Of the calibration, in the servo's steps; 4095 are a turn."""
DEGREES = 360 / 4095
AT_REST = MIDDLE + 60.0 * (np.arange(1, 7) % 3 - 1)
"""Where the servos stand at first, in steps."""
FASTEST = 4000
"""Steps per second of a servo."""
_PING, _READ, _WRITE, _SYNC_READ, _SYNC_WRITE = 1, 2, 3, 0x82, 0x83
_MODEL, _LEAST, _MOST, _OFFSET, _TORQUE, _GOAL, _PRESENT = 3, 9, 11, 31, 40, 42, 56


def calibration() -> dict[str, Any]:
    """What lerobot-calibrate would have written."""
    return {
        name: {
            "id": number, "drive_mode": 0, "homing_offset": 0, "range_min": MIDDLE - REACH,
            "range_max": MIDDLE + REACH,
        }
        for number, name in enumerate(JOINTS, start=1)
    }  # fmt: skip


def in_units(steps: np.ndarray) -> np.ndarray:
    """Positions ``(..., 6)`` in steps as lerobot gives them: degrees, and percent of the gripper."""
    degrees = (steps[..., :5] - MIDDLE) * DEGREES
    return np.concatenate([degrees, (steps[..., 5:] - MIDDLE + REACH) / (2 * REACH) * 100], axis=-1)


@dataclass(frozen=True)
class Faults:
    """How often the bus fails, of its polls, and how often it falls silent for a while."""

    missing: float = 0.004
    garbled: float = 0.004
    late: float = 0.01
    silent_every_s: float = 45.0
    silent_s: tuple[float, float] = (0.1, 1.0)


class Servo:
    """One servo: its table of registers, and a motor that follows the goal."""

    def __init__(self, position: int) -> None:
        self.table = bytearray(256)
        self.position, self.moved = float(position), time.monotonic()
        for address, value in (
            (_MODEL, 777),
            (_LEAST, MIDDLE - REACH),
            (_MOST, MIDDLE + REACH),
            (_GOAL, position),
        ):
            self.table[address : address + 2] = value.to_bytes(2, "little")
        self.table[0:2] = bytes([3, 10])

    def read(self, address: int, length: int) -> bytes:
        """Registers, the position being that of now."""
        now = time.monotonic()
        goal = int.from_bytes(self.table[_GOAL : _GOAL + 2], "little")
        if self.table[_TORQUE]:
            room = FASTEST * (now - self.moved)
            self.position += float(np.clip(goal - self.position, -room, room))
        self.moved = now
        self.table[_PRESENT : _PRESENT + 2] = round(self.position).to_bytes(2, "little")
        return bytes(self.table[address : address + length])

    def write(self, address: int, data: bytes) -> None:
        """Registers."""
        self.read(_PRESENT, 2)  # it moved towards the goal of before until now
        self.table[address : address + len(data)] = data


class Bus:
    """Six servos on one wire.

    Args:
        descriptor: of the pseudo-terminal's near end.
        faults: how it fails; none until the robot was connected and polled once.
        seed: of the faults.
    """

    def __init__(self, descriptor: int, faults: Faults, seed: int = 0) -> None:
        self.descriptor, self.faults = descriptor, faults
        self.rng = np.random.default_rng(seed)
        self.servos = {number: Servo(int(at)) for number, at in enumerate(AT_REST, start=1)}
        self.received: list[tuple[float, ...]] = []
        self.injected: dict[str, list[float]] = {"missing": [], "garbled": [], "late": [], "silent": []}
        self.polls = 0
        self.buffer = bytearray()
        self.silent = (float("inf"), 0.0)  # from, to
        self.last_silence = 0.0

    def serve(self, ended: Any) -> None:
        """Answer until told to end."""
        while not ended.is_set():
            if select.select([self.descriptor], [], [], 0.05)[0]:
                try:
                    self.buffer += os.read(self.descriptor, 4096)
                except OSError:  # nobody has it open
                    time.sleep(0.05)
                    continue
                self._packets()

    def _packets(self) -> None:
        while True:
            start = self.buffer.find(b"\xff\xff")
            if start < 0 or len(self.buffer) < start + 4:
                return
            end = start + 4 + self.buffer[start + 3]
            if len(self.buffer) < end:
                return
            packet = bytes(self.buffer[start:end])
            del self.buffer[:end]
            if ~sum(packet[2:-1]) & 0xFF == packet[-1]:
                self._execute(packet[2], packet[4], packet[5:-1])

    def _execute(self, number: int, instruction: int, given: bytes) -> None:
        if instruction == _SYNC_WRITE:
            address, length = given[0], given[1]
            for at in range(2, len(given), length + 1):
                self.servos[given[at]].write(address, given[at + 1 : at + 1 + length])
            if address == _GOAL:
                goals = [
                    int.from_bytes(each.table[_GOAL : _GOAL + 2], "little") for each in self.servos.values()
                ]
                self.received.append((time.monotonic(), *goals))
        elif instruction == _SYNC_READ:
            self.polls += 1
            replies = b"".join(
                self._status(each, self.servos[each].read(given[0], given[1])) for each in given[2:]
            )
            self._answer(replies)
        elif number in self.servos:
            servo = self.servos[number]
            if instruction == _WRITE:
                servo.write(given[0], given[1:])
            data = servo.read(given[0], given[1]) if instruction == _READ else b""
            os.write(self.descriptor, self._status(number, data))

    def _status(self, number: int, data: bytes) -> bytes:
        body = bytes([number, len(data) + 2, 0]) + data
        return b"\xff\xff" + body + bytes([~sum(body) & 0xFF])

    def _answer(self, replies: bytes) -> None:
        """To a poll, unless the bus fails."""
        now, faults = time.monotonic(), self.faults
        if self.polls == 60:  # it is known to work by now
            self.last_silence = now
        if self.polls > 60 and now > self.last_silence + faults.silent_every_s:
            self.silent = (now, now + float(self.rng.uniform(*faults.silent_s)))
            self.last_silence = now
        if self.silent[0] <= now < self.silent[1]:
            self.injected["silent"].append(now)
            return
        luck = self.rng.random() if self.polls > 60 else 1.0
        if luck < faults.missing:
            self.injected["missing"].append(now)
            return
        if luck < faults.missing + faults.garbled:
            self.injected["garbled"].append(now)
            replies = replies[:-1] + bytes([replies[-1] ^ 0x55])
        elif luck < faults.missing + faults.garbled + faults.late:
            self.injected["late"].append(now)
            time.sleep(float(self.rng.uniform(0.005, 0.03)))
        os.write(self.descriptor, replies)


def _serve(descriptor: int, faults: Faults, ended: Any, kept: Path) -> None:
    bus = Bus(descriptor, faults)
    with real_time_priority():  # servos do not wait for this machine's other work
        bus.serve(ended)
    np.save(kept, np.array(bus.received).reshape(-1, 7))
    kept.with_suffix(".json").write_text(json.dumps({"polls": bus.polls, "injected": bus.injected}))


class Arm:
    """The servos in a process of their own, on a pseudo-terminal.

    Args:
        folder: where the commands that arrived are kept, as ``commands.npy``, and what was injected.
        faults: how the bus fails.

    Attributes:
        port: the far end, for lerobot.
    """

    def __init__(self, folder: Path, faults: Faults | None = None) -> None:
        near, far = os.openpty()
        tty.setraw(far)
        self.port, self._far = os.ttyname(far), far  # kept open, so that the near end never hangs up
        self.kept = folder / "commands.npy"
        context = multiprocessing.get_context("fork")
        self._ended = context.Event()
        self._process = context.Process(
            target=_serve, args=(near, faults or Faults(), self._ended, self.kept), daemon=True
        )
        self._process.start()
        os.close(near)

    def close(self) -> None:
        """End it, and keep what arrived: ``commands.npy`` ``(n, 7)``, time and goals in steps, and in
        ``commands.json`` the times of the polls that failed."""
        self._ended.set()
        self._process.join(10)
        os.close(self._far)


def picture(seconds: float, height: int, width: int, tint: int) -> np.ndarray:
    """What a camera sees at a time: a bar that moves over a still background, ``(h, w, 3)``."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([(rows + columns) % 256, columns * 255 // width, np.full_like(rows, tint)], -1)
    at = int(seconds * 60) % width
    image[:, at : at + width // 10] = 255
    return image.astype(np.uint8)


if CameraConfig is not None:

    @CameraConfig.register_subclass("double")
    @dataclass
    class DoubleCameraConfig(CameraConfig):
        """A camera that is none.

        Attributes:
            tint: of its pictures.
            latency_s: from the picture to its arrival.
            frozen_every_s: interval at which it freezes.
            frozen_s: for how long.
        """

        tint: int = 0
        latency_s: float = 0.06
        frozen_every_s: float = 70.0
        frozen_s: float = 0.8

    class DoubleCamera(Camera):
        """Shows pictures that are some time old, and freezes now and then."""

        def __init__(self, config: DoubleCameraConfig) -> None:
            super().__init__(config)
            self.config, self._connected = config, False
            self.began = time.monotonic()

        @property
        def is_connected(self) -> bool:
            """Whether it is."""
            return self._connected

        @staticmethod
        def find_cameras() -> list[dict[str, Any]]:
            """None of this machine's."""
            return []

        def connect(self, warmup: bool = True) -> None:
            """As any camera."""
            self._connected = True

        def read(self) -> np.ndarray:
            """The newest picture."""
            return self.read_latest()

        def async_read(self, timeout_ms: float = 200) -> np.ndarray:
            """The newest picture."""
            return self.read_latest()

        def read_latest(self, max_age_ms: int = 500) -> np.ndarray:
            """The newest picture; one that is too old is an error, as of lerobot's cameras."""
            config = self.config
            now = time.monotonic() - self.began
            into = now % config.frozen_every_s - (config.frozen_every_s - config.frozen_s)
            frozen = max(into, 0.0)
            if 1e3 * frozen > max_age_ms:
                raise TimeoutError(f"latest frame is too old: {1e3 * frozen:.0f} ms")
            shown = np.floor((now - frozen - config.latency_s) * config.fps) / config.fps
            return picture(shown, config.height, config.width, config.tint)

        def disconnect(self) -> None:
            """As any camera."""
            self._connected = False
