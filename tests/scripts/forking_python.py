"""Python for tests that start programs: each is forked from one process that has imported what they need.

    python forking_python.py SOCKET

serves commands; :func:`start` starts it and writes a stand-in for ``python``, by which shells, torchrun and
tests use it as they would use the real one. A program is a process of its own, with its own folder,
environment, streams and exit status: all that it does not have of its own is the import of torch and the
simulators, which takes longer than most of what tests let it do. The parent computes nothing and has no
threads, so that nothing is lost by forking it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    "torch", "torch._dynamo", "torch.distributed.run", "torch.onnx._internal.exporter._core", "hydra", "zarr",
    "scipy.stats", "gymnasium.envs.mujoco.hopper_v5", "matplotlib.pyplot", "imageio", "stable_baselines3",
    "onnxscript", "onnxruntime", "pyarrow.parquet", "flowpolicy.cli", "flowpolicy.pretraining.run",
    "flowpolicy.finetuning.run", "flowpolicy.control.run", "flowpolicy.serving.run",
    "flowpolicy.data.inspection", "flowpolicy.acceleration.choosing.choose", "flowpolicy_envs.collection",
)  # fmt: skip

EMPTY_FIGURES = "FORKED_PROGRAMS_LEAVE_EMPTY_FIGURES"  # variable of programs whose pictures nobody looks at

# The stand-in. What reaches it by signal is passed on, so that it ends as its program does.
CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    said = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    streams = array.array("i", [0, 1, 2])
    server.sendmsg([len(said).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(said)
    answers = server.makefile()
    child = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(child, number))
    status = int(answers.readline())
sys.exit(status)
"""


@contextlib.contextmanager
def start(folder: Path) -> Iterator[Path]:
    """The stand-in for ``python``, in ``folder``, as long as the context lasts."""
    address, python = folder / "socket", folder / "python"
    python.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    python.chmod(0o755)
    command = [sys.executable, __file__, str(address)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with server:
        assert server.stdout.readline() == b"ready\n"
        yield python
        server.stdin.close()


def serve(address: str) -> None:
    """Fork a child for each command, until the process that started this one is gone."""
    import gc
    import importlib
    import selectors
    import socket

    for module in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.freeze()  # else every collection in a child goes through, and copies, what was imported here
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while sys.stdin not in [key.fileobj for key, _ in selector.select()]:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    selector.close()
                    answer(connection)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def answer(connection) -> None:
    """Read a command, run it in a child and send its id and its exit status; ends this process."""
    import json
    import socket

    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    words, folder, environment = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
    child = os.fork()
    if child == 0:
        connection.close()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os._exit(run(words))
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{child}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(f"{status if status >= 0 else 128 - status}\n".encode())
    os._exit(0)


def run(words: list[str]) -> int:
    """``python *words``, with all that Python does at its end but taking down every module."""
    import atexit
    import runpy
    import threading
    import traceback

    words = [word for word in words if word not in ("-P", "-u")]
    sys.path[1:1] = [
        str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(":") if entry
    ]
    if os.environ.get(EMPTY_FIGURES):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg.print_png = lambda self, path: Path(path).write_bytes(b"")
    status = 0
    try:
        if words[0] in ("-m", "-c"):
            sys.argv = words[1:]
            sys.path[0] = str(Path.cwd())
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv[0] = "-c"
                exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status


if __name__ == "__main__":
    serve(sys.argv[1])
