"""The policy server under load, under attack and under the axe, driven by the published `openpi-client`.

    python benchmarks/serving.py                    # everything, about eight minutes
    python benchmarks/serving.py --parts load       # one part; the others keep their results

`load`: a server in its own process (scripts/serve.py), the published client in another, over loopback: latency of
every request, and the largest difference from inference in this process under the same x_0. `attack`: hostile
connections of many kinds while the published client and one that connects anew again and again are served.
`starved`: the same with floods of a few kinds on servers that may open few files, and the lines that they log.
`restarts`: servers that are killed and started again while our client asks without a pause.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.sampler import build_sampler, fastest_backend
from flowpolicy.control.inference_hosts import PRELOAD
from flowpolicy.evaluation.statistics import percentiles
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.runs.progress import progress
from flowpolicy.runs.worker_process import process_context
from flowpolicy.serving.client import PolicyClient, ServerUnreachableError
from flowpolicy.serving.config import ServerConfig
from flowpolicy.serving.messages import encode
from flowpolicy.serving.server import PolicyServer
from flowpolicy.serving.service import PolicyService

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "serving.json"
CHECKPOINTS = {
    "hopper, shortcut": ("benchmarks/checkpoints/hopper-shortcut-seed0", 10_000),
    "push-t, flow matching": ("benchmarks/checkpoints/pusht-flow_matching-seed0", 2_000),
}
TOKEN = "benchmark-token"
PARTS = ("load", "attack", "starved", "restarts")
FLOODS = {  # name -> kinds of connections, how many of each at once, files that the server may open
    "half-open, 256 files": (("silence", "truncated handshake"), 350, 256),
    "connect and reset, 1,024 files": (("connect and reset",), 200, 1024),
    "fragments, 1,024 files": (("flood of fragments",), 8, 1024),
}
SEED = 0


# Servers and clients in processes of their own


class Served:
    """scripts/serve.py in its own process, from the moment that it listens."""

    def __init__(self, checkpoint: str, *options: str, open_files: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory()
        command = [
            sys.executable, str(ROOT / "scripts" / "serve.py"), f"checkpoint={ROOT / checkpoint}", "port=0",
            "threads=1", "device=cpu", "run_dir=run", *options,
        ]  # fmt: skip
        self._program = subprocess.Popen(
            command, cwd=self._folder.name, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "FLOWPOLICY_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"},
            preexec_fn=functools.partial(_limit_open_files, open_files) if open_files else None,
        )  # fmt: skip
        self.pid, self.said = self._program.pid, []
        assert self._program.stderr is not None
        for line in self._program.stderr:
            self.said.append(line)
            if found := re.search(r"ws://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise SystemExit("The server did not start:\n" + "".join(self.said))
        self.port = int(found.group(1))
        threading.Thread(target=self.said.extend, args=(self._program.stderr,), daemon=True).start()

    def end(self) -> dict[str, Any]:
        """End it as a user would; its summary."""
        self._program.send_signal(signal.SIGTERM)
        if self._program.wait(30) != 0:
            raise SystemExit("The server did not end well:\n" + "".join(self.said))
        return read_json(Path(self._folder.name) / "run" / "summary.json")

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exception: object) -> None:
        self._program.kill()
        self._program.wait()
        self._folder.cleanup()


def _limit_open_files(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def openpi_client(port: int) -> Any:
    os.environ["no_proxy"] = "127.0.0.1"
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    return WebsocketClientPolicy("127.0.0.1", port, api_key=TOKEN)


def requests_of(policy_shapes: dict[str, list[int]], obs_horizon: int, chunk: tuple[int, int], count: int):
    """The same observations and x_0 in every process."""
    rng = np.random.default_rng(SEED)
    observations = {
        key: rng.normal(size=(count, obs_horizon, *shape)).astype(np.float32)
        for key, shape in policy_shapes.items()
    }
    return observations, rng.normal(size=(count, *chunk)).astype(np.float32)


def drive(port: int, count: int, seconds: float, output: Path) -> None:
    """In a process of its own: the published client asks ``count`` times, or for ``seconds``."""
    client = openpi_client(port)
    told = client.get_server_metadata()
    rows = count or 256
    chunk = (told["action_horizon"], told["action_dim"])
    observations, noise = requests_of(told["observation_shapes"], told["obs_horizon"], chunk, rows)
    times, infer, started_at, actions, failures = [], [], [], [], 0
    ends = time.monotonic() + (seconds or float("inf"))
    index = 0
    while index < count if count else time.monotonic() < ends:
        row = index % rows
        request = {key: value[row] for key, value in observations.items()} | {"noise": noise[row]}
        started = time.perf_counter()
        try:
            answer = client.infer(request)
        except RuntimeError:
            failures += 1
            continue
        times.append(time.perf_counter() - started)
        if not index:
            output.with_suffix(".ready").touch()
        started_at.append(time.time())
        infer.append(answer["policy_timing"]["infer_ms"])
        if count:
            actions.append(answer["actions"])
        index += 1
        if seconds:
            time.sleep(0.01)  # a robot of at most 100 Hz
    np.savez(output, times=times, infer=infer, at=started_at, actions=np.array(actions), failures=failures)


def in_process(role: str, **options: Any) -> subprocess.Popen[bytes]:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return subprocess.Popen([sys.executable, __file__, "--role", role, *arguments])


# Load


def load(checkpoint: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "client.npz"
        with Served(checkpoint) as running:
            client = in_process("drive", port=running.port, count=count, output=file)
            if client.wait(1200) != 0:
                raise SystemExit("The client failed.")
            server = running.end()
        found = np.load(file)
    policy = FlowPolicy.load(ROOT / checkpoint)
    sampler = build_sampler(policy, batch_size=1, backend=fastest_backend(policy.device))
    shapes = {key: list(shape) for key, shape in policy.spec.observation_shapes.items()}
    chunk = (policy.spec.action_horizon, policy.spec.action_dim)
    observations, noise = requests_of(shapes, policy.spec.obs_horizon, chunk, count)
    wanted, seconds = np.zeros((count, *chunk), np.float32), []
    for row in progress(count, "in-process"):
        request = {key: value[row, None] for key, value in observations.items()}
        started = time.perf_counter()
        wanted[row] = sampler(request, torch.from_numpy(noise[row, None]))[0].numpy()
        seconds.append(time.perf_counter() - started)
    difference = np.abs(found["actions"] - wanted)
    return {
        "checkpoint": checkpoint, "requests": len(found["times"]), "failures": int(found["failures"]),
        "backend": server["served"]["backend"], "num_steps": server["served"]["num_steps"],
        "round_trip_ms": percentiles(1e3 * found["times"]),
        "server_ms": server["metrics"]["milliseconds"],
        "inference_ms": percentiles(found["infer"]),
        "overhead_ms": percentiles(1e3 * found["times"] - found["infer"]),
        "in_process_ms": percentiles(1e3 * np.array(seconds)),
        "max_abs_difference": float(difference.max()), "identical_chunks": int((difference.max((1, 2)) == 0).sum()),
        "action_range": float(np.abs(wanted).max()),
    }  # fmt: skip


# Attack


def handshake(token: str = TOKEN, extra: str = "") -> bytes:
    return (
        "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        + (f"Authorization: Api-Key {token}\r\n" if token else "") + extra + "\r\n"
    ).encode()  # fmt: skip


def frame(data: bytes, opcode: int = 2, fin: bool = True, claim: int | None = None) -> bytes:
    """A frame masked with zeros."""
    length = len(data) if claim is None else claim
    head = bytes([opcode | (0x80 if fin else 0)])
    if length < 126:
        head += bytes([0x80 | length])
    elif length < 65536:
        head += bytes([0xFE]) + struct.pack("!H", length)
    else:
        head += bytes([0xFF]) + struct.pack("!Q", length)
    return head + bytes(4) + data


def hostile_kinds() -> dict[str, tuple[bytes, str]]:
    """Kind -> what it sends first, and what it does then: ``wait``, ``drip``, ``repeat`` or ``reset``."""
    rng = np.random.default_rng(SEED)
    valid = encode({"observation": np.zeros((1, 11), np.float32)})
    many = encode({"observation": np.zeros((64, 1, 11), np.float32)})
    bomb = b"\x91" * 4000
    wide = b"\x9f" + (b"\xdc\x01\xf4" + b"\x90" * 500) * 15
    objects = encode({"observation": np.zeros((1, 11), np.float32)}).replace(b"<f4", b"|O8")
    lie = encode({"observation": np.zeros((1, 11), np.float32)}).replace(b"\x92\x01\x0b", b"\x92\x7f\x7f")
    return {
        "garbage bytes": (rng.bytes(5000), "wait"),
        "silence": (b"", "wait"),
        "truncated handshake": (handshake()[:70], "wait"),
        "slow handshake": (handshake()[:20], "drip"),
        "huge header": (handshake(extra="X-Long: " + "a" * 1_000_000 + "\r\n"), "wait"),
        "10,000 headers": (handshake(extra="".join(f"X-{i}: a\r\n" for i in range(10_000))), "wait"),
        "wrong token": (handshake("another-token"), "wait"),
        "no token": (handshake(""), "wait"),
        "web page": (handshake(extra="Origin: https://example.com\r\n"), "wait"),
        "tls hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.bytes(507), "wait"),
        "broken frames": (handshake() + rng.bytes(2000), "wait"),
        "terabyte frame": (handshake() + frame(b"", claim=2**40), "drip"),
        "oversized message": (handshake() + frame(bytes(1_000_000)), "repeat"),
        "truncated message": (handshake() + frame(valid, claim=len(valid) + 500), "wait"),
        "slow message": (handshake() + frame(valid[:20], claim=len(valid)), "drip"),
        "endless fragments": (handshake() + frame(b"a", fin=False), "fragments"),
        "msgpack garbage": (handshake() + frame(rng.bytes(3000)), "repeat"),
        "msgpack nesting": (handshake() + frame(bomb), "repeat"),
        "msgpack width": (handshake() + frame(wide), "repeat"),
        "object array": (handshake() + frame(objects), "repeat"),
        "lying shape": (handshake() + frame(lie), "repeat"),
        "takes no answers": (handshake() + 20 * frame(many), "repeat, unread"),
        "flood of requests": (handshake() + 50 * frame(valid), "repeat"),
        "reset while served": (handshake() + frame(valid), "reset"),
        "silent client": (handshake(), "wait"),
    }


def floods() -> dict[str, tuple[bytes, str]]:
    """As :func:`hostile_kinds`: what many connections at once do."""
    fragments = frame(b"a", fin=False) + 2000 * frame(b"a", 0, False)
    return {
        "connect and reset": (b"", "reset"),
        "flood of fragments": (handshake() + fragments, "repeat"),
    }


async def one_hostile(port: int, first: bytes, then: str, ends: float, seen: Counter[str]) -> None:
    """One place that connects again and again until ``ends``."""
    loop = asyncio.get_running_loop()
    message = first[first.find(b"\r\n\r\n") + 4 :]
    while loop.time() < ends:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            seen["refused"] += 1
            await asyncio.sleep(0.1)
            continue
        seen["connections"] += 1
        with contextlib.suppress(OSError, TimeoutError):
            writer.write(first)
            if then == "reset":
                await asyncio.sleep(0.002)
                writer.transport.abort()
            elif then == "wait":
                async with asyncio.timeout(max(min(ends - loop.time(), 4), 0.1)):
                    while await reader.read(65536):
                        pass
            else:
                drain = None
                if "unread" not in then:
                    drain = asyncio.create_task(_read_all(reader))
                else:
                    writer.transport.pause_reading()
                stops = min(ends, loop.time() + 4)  # what the server need not end is renewed all the same
                while (
                    loop.time() < (stops if then.startswith("repeat") else ends)
                    and not (drain and drain.done())
                    and not writer.is_closing()
                ):
                    part = {"drip": b"a", "fragments": frame(b"a", 0, False)}.get(then, message)
                    writer.write(part)
                    await asyncio.wait_for(writer.drain(), 1.0)
                    await asyncio.sleep(0.5 if then in ("drip", "fragments") else 0.02)
                if drain:
                    drain.cancel()
        writer.transport.abort()
        seen["ended"] += 1
        await asyncio.sleep(0.2)


async def _read_all(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(65536):
            pass


def besiege(port: int, places: int, seconds: float, output: Path, names: list[str]) -> None:
    """In a process of its own: ``places`` hostile connections of each kind at once, each renewed as it ends."""

    async def main() -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        kinds = {name: {**hostile_kinds(), **floods()}[name] for name in names or hostile_kinds()}
        seen: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
        ends = loop.time() + seconds
        await asyncio.gather(
            *(
                one_hostile(port, *what, ends, seen[kind])
                for kind, what in kinds.items()
                for _ in range(places)
            )
        )
        return {kind: dict(counts) for kind, counts in seen.items()}

    output.write_text(json.dumps(asyncio.run(main())))


def knock(port: int, seconds: float, output: Path) -> None:
    """In a process of its own: a new published client again and again, each asking once."""
    waits, failed = [], 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        started = time.perf_counter()
        while True:
            try:
                client = openpi_client(port)
                told = client.get_server_metadata()
                shapes = told["observation_shapes"].items()
                client.infer({k: np.zeros((told["obs_horizon"], *s), np.float32) for k, s in shapes})
                client._ws.close()
                break
            except Exception:  # refused as the server is full, or dropped: knock again
                failed += 1
                if time.monotonic() > ends + 20:
                    break
                time.sleep(0.05)
        waits.append(time.perf_counter() - started)
        time.sleep(0.25)
    np.savez(output, waits=waits, failed=failed)


def attack(
    checkpoint: str,
    places: int,
    seconds: float,
    kinds: Sequence[str] = (),
    calm: float = 10.0,
    open_files: int = 0,
) -> dict[str, Any]:
    """Everything hostile at once or, with ``kinds``, only these; good clients before, during and after."""
    limits = [] if kinds else ["handshake_timeout_s=2", "message_timeout_s=3", "write_timeout_s=3"]
    with (
        tempfile.TemporaryDirectory() as name,
        Served(checkpoint, *limits, open_files=open_files) as running,
    ):
        folder, port, pid = Path(name), running.port, running.pid
        before = _memory_mb(pid)
        good = in_process("drive", port=port, seconds=seconds + 2 * calm + 5, output=folder / "good.npz")
        while not (folder / "good.ready").exists() and good.poll() is None:
            time.sleep(0.1)
        time.sleep(calm)
        began, lines = time.time(), len(running.said)
        siege = in_process(
            "besiege",
            port=port,
            places=places,
            seconds=seconds,
            output=folder / "siege.json",
            kinds=",".join(kinds),
        )
        knocking = in_process("knock", port=port, seconds=seconds, output=folder / "knock.npz")
        most = before
        while siege.poll() is None:
            most = max(most, _memory_mb(pid))
            time.sleep(0.25)
        ended, lines = time.time(), len(running.said) - lines
        if any(process.wait(120) != 0 for process in (siege, knocking, good)):
            raise SystemExit("A client of the attack failed.")
        found, knocked = np.load(folder / "good.npz"), np.load(folder / "knock.npz")
        by_kind = json.loads((folder / "siege.json").read_text())
        with PolicyClient(port=port, token=TOKEN) as client:  # it still serves
            client.infer(np.zeros(client.metadata["observation_shapes"]["observation"]))
        after = _memory_mb(pid)
        server = running.end()["metrics"]
    during = (found["at"] > began) & (found["at"] < ended)
    return {
        "checkpoint": checkpoint, "kinds": len(by_kind), "at_once": places * len(by_kind), "seconds": seconds,
        "connections": sum(counts.get("connections", 0) for counts in by_kind.values()), "by_kind": by_kind,
        "fewest_of_a_kind": min(counts.get("connections", 0) for counts in by_kind.values()),
        "open_files": open_files or None, "log_lines": lines,
        "good_client": {
            "requests_during": int(during.sum()), "failures": int(found["failures"]),
            "calm_ms": percentiles(1e3 * found["times"][~during]),
            "during_ms": percentiles(1e3 * found["times"][during]),
        },
        "new_clients": {
            "served": len(knocked["waits"]), "refused_on_the_way": int(knocked["failed"]),
            "wait_ms": percentiles(1e3 * knocked["waits"]),
        },
        "memory_mb": {"before": before, "most": most, "after": after},
        "server": server,
    }  # fmt: skip


def _memory_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found.group(1)) / 1024 if found else float("nan")


# Restarts


def serve_here(checkpoint: str, port: int) -> None:
    torch.set_num_threads(1)
    policy = FlowPolicy.load(ROOT / checkpoint)
    PolicyServer(PolicyService(build_sampler(policy)), ServerConfig(port=port, token=TOKEN)).run()


def restarts(checkpoint: str, count: int) -> dict[str, Any]:
    """Kill (or, every second time, end) the server while our client asks; start it again."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context, rng = process_context(*PRELOAD), np.random.default_rng(SEED)

    def start() -> Any:
        process = context.Process(target=serve_here, args=(checkpoint, port), daemon=True)
        process.start()
        return process

    process = start()
    client = PolicyClient(port=port, token=TOKEN, connect_timeout=60.0)
    observation = np.zeros(
        (client.spec.obs_horizon, *client.spec.observation_shapes["observation"]), np.float32
    )
    errors: list[int] = []
    sentences: Counter[str] = Counter()
    back, answered = [], 0
    for number in progress(count, "restarts"):
        client.infer(observation)
        seen, lost_at = 0, 0.0
        # From another thread, so that the blow falls at any moment of a request.
        blow = process.terminate if number % 2 else process.kill
        threading.Timer(rng.uniform(0.02, 0.2), blow).start()
        while True:
            try:
                client.infer(observation)
                answered += 1
                if seen:
                    back.append(time.monotonic() - lost_at)
                    break
            except ServerUnreachableError as error:
                seen, lost_at = seen + 1, time.monotonic()
                sentences[re.sub(r"\([^)]*\)", "(...)", str(error)).replace(str(port), "PORT")] += 1
                process = start()
        errors.append(seen)
    client.close()
    process.terminate()
    process.join(10)
    return {
        "checkpoint": checkpoint, "restarts": count, "killed": (count + 1) // 2, "terminated": count // 2,
        "errors_per_restart": dict(sorted(Counter(errors).items())), "sentences": dict(sentences),
        "answered": answered, "back_after_s": percentiles(np.array(back)),
    }  # fmt: skip


# Tables


def table(content: dict[str, Any]) -> str:
    lines = []
    if "load" in content:
        lines += ["| policy | requests | what | p50 ms | p99 ms | p99.9 ms | max ms |", "|" + " --- |" * 7]
        for name, row in content["load"].items():
            label = f"{name}, K = {row['num_steps']}, {row['backend']}"
            for what in ("round_trip_ms", "inference_ms", "overhead_ms", "in_process_ms"):
                times = " | ".join(f"{row[what][at]:.3f}" for at in ("p50", "p99", "p99_9", "max"))
                lines.append(f"| {label} | {row['requests']} | {what[:-3].replace('_', ' ')} | {times} |")
        lines += [
            f"\n{name}: max abs difference from in-process inference {row['max_abs_difference']:.2g}, "
            f"{row['identical_chunks']} of {row['requests']} chunks identical, {row['failures']} failures"
            for name, row in content["load"].items()
        ]
    if "attack" in content:
        row = content["attack"]
        lines += [
            f"\n{row['connections']} hostile connections of {row['kinds']} kinds (at least "
            f"{row['fewest_of_a_kind']} of each), {row['at_once']} at once, in {row['seconds']:g} s; memory {row['memory_mb']['before']:.0f} MB before, "
            f"{row['memory_mb']['most']:.0f} at most, {row['memory_mb']['after']:.0f} after\n",
            "| client | served | failures | p50 ms | p99 ms | max ms |", "|" + " --- |" * 6,
        ]  # fmt: skip
        good, new = row["good_client"], row["new_clients"]
        for label, served_count, failures, times in (
            ("connected, before and after", "", good["failures"], good["calm_ms"]),
            ("connected, during", good["requests_during"], good["failures"], good["during_ms"]),
            ("connecting anew, during", new["served"], new["refused_on_the_way"], new["wait_ms"]),
        ):
            figures = " | ".join(f"{times[at]:.1f}" for at in ("p50", "p99", "max"))
            lines.append(f"| {label} | {served_count} | {failures} | {figures} |")
    if "starved" in content:
        lines += [
            "",
            "| flood | connections | log lines | served p50 ms | p99 ms | new client p99 ms |",
            "|" + " --- |" * 6,
        ]
        for name, row in content["starved"].items():
            good, new = row["good_client"]["during_ms"], row["new_clients"]["wait_ms"]
            lines.append(
                f"| {name} | {row['connections']} | {row['log_lines']} | {good['p50']:.1f} | {good['p99']:.1f} | {new['p99']:.1f} |"
            )
    if "restarts" in content:
        row = content["restarts"]
        lines.append(
            f"\n{row['restarts']} restarts ({row['killed']} killed): errors of the client per restart "
            f"{row['errors_per_restart']}; back after p50 {row['back_after_s']['p50']:.2f} s, "
            f"max {row['back_after_s']['max']:.2f} s"
        )
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output or OUTPUT)
    content = read_json(output) if output.exists() else {}
    hopper = CHECKPOINTS["hopper, shortcut"][0]
    torch.set_num_threads(1)
    for part in arguments.parts:
        started, busy = time.time(), os.getloadavg()[0]
        if part == "load":
            found: Any = {
                name: load(checkpoint, arguments.requests or count)
                for name, (checkpoint, count) in CHECKPOINTS.items()
            }
        elif part == "attack":
            found = attack(hopper, arguments.places, arguments.seconds)
        elif part == "starved":
            found = {
                name: attack(hopper, places, arguments.flood_seconds, kinds, calm=3.0, open_files=open_files)
                for name, (kinds, places, open_files) in FLOODS.items()
            }
        else:
            found = restarts(hopper, arguments.restarts)
        content[part] = found
        content.setdefault("runs", {})[part] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "wall_seconds": time.time() - started,
            "load_average_before": busy, "load_average_after": os.getloadavg()[0],
        }  # fmt: skip
        packages = {name: metadata.version(name) for name in ("openpi-client", "websockets", "msgpack")}
        content |= {
            "command": "python benchmarks/serving.py", "seed": SEED, "machine": machine(),
            "versions": versions() | packages, "git_commit": git_state()[0],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(output, content)
    print(table(content))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, default=0, help="of a load, in place of the usual number")
    parser.add_argument("--places", type=int, default=10, help="hostile connections of each kind at once")
    parser.add_argument("--seconds", type=float, default=90.0, help="of the attack")
    parser.add_argument("--flood-seconds", type=float, default=10.0, help="of each flood")
    parser.add_argument("--restarts", type=int, default=60)
    parser.add_argument("--output", default="", help="another JSON file, for a trial")
    parser.add_argument("--role", default="measure", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kinds", default="", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "drive":
        seconds = 0 if arguments.count else arguments.seconds
        drive(arguments.port, arguments.count, seconds, Path(arguments.output))
    elif arguments.role == "besiege":
        kinds = [kind for kind in arguments.kinds.split(",") if kind]
        besiege(arguments.port, arguments.places, arguments.seconds, Path(arguments.output), kinds)
    elif arguments.role == "knock":
        knock(arguments.port, arguments.seconds, Path(arguments.output))
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
