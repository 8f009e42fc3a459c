"""What is installed and what works here, on one screen; needs no extra."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import flowpolicy
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.evaluation.rendering import NO_GL_BACKEND, choose_gl_backend, refused_gl_choice
from flowpolicy.evaluation.summary import machine

FOR_DEVELOPERS = ("test", "docs", "dev")
"""Extras that a user has no need of."""
_CORE = ("torch", "numpy", "safetensors")
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<extras>[^\]]*)\])?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
_LABEL = 14  # characters


def report() -> str:
    """Versions, devices, memory, rendering, compilers, ONNX Runtime, and each extra with what it lacks."""
    lines = [
        ("flowpolicy", f"{flowpolicy.__version__}, {Path(flowpolicy.__file__).parent}"),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        *((name, metadata.version(name)) for name in _CORE),
        ("CPU", _cpu()),
        *(("GPU", gpu) for gpu in _gpus()),
        ("Memory", f"{_gigabytes(free_memory_bytes())} free"),
        ("Disk", f"{_gigabytes(shutil.disk_usage(Path.cwd()).free)} free in {Path.cwd()}"),
        ("Rendering", _rendering()),
        ("torch.compile", _compilers()),
        ("ONNX Runtime", _onnx()),
    ]
    text = [f"{label:<{_LABEL}}{words}" for label, words in lines]
    return "\n".join([*text, "", "Extras", *_extras()])


def _cpu() -> str:
    about = machine()
    fast = "bfloat16 in hardware" if torch.cpu._is_avx512_bf16_supported() else "float32 (no fast bfloat16)"
    return f"{about['cpu']}, {about['cores']} cores for this process, {fast}"


def _gpus() -> Iterator[str]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        kind = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        yield f"cuda:{index}, {about.name}, {_gigabytes(about.total_memory)}, {kind}"
    if torch.backends.mps.is_available():
        yield "mps, of Apple; used where device=mps says so"
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
        yield f"none that this torch, {built_for}, can use"


def _rendering() -> str:
    if importlib.util.find_spec("mujoco") is None:
        return "MuJoCo is not installed; no videos of its environments"
    backend = choose_gl_backend()
    if backend is not None:
        return f"{backend} works (MUJOCO_GL)"
    return refused_gl_choice() or f"{NO_GL_BACKEND}; no videos of MuJoCo's environments"


def _compilers() -> str:
    compiler = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
    path = shutil.which(compiler)
    cpu = f"{path} for the CPU" if path else f"no C++ compiler {compiler} for the CPU (set CXX to one)"
    if not torch.cuda.is_available():
        return cpu
    has_triton = importlib.util.find_spec("triton") is not None
    return f"{cpu}; {'Triton' if has_triton else 'no Triton'} for the GPU"


def _onnx() -> str:
    try:
        import onnxruntime
    except ImportError:
        return "not installed; samplers run in PyTorch"
    providers = (name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return f"{onnxruntime.__version__}, {', '.join(providers)}"


def _extras() -> Iterator[str]:
    """A line for each extra."""
    try:
        declared = metadata.requires("flowpolicy") or []
    except metadata.PackageNotFoundError:
        yield "  unknown, as flowpolicy runs from a folder and is not installed: pip install -e FOLDER"
        return
    extras: dict[str, list[str]] = {}
    for requirement in declared:
        text, _, marker = requirement.partition(";")
        for name in _EXTRA.findall(marker):
            extras.setdefault(name, []).append(text.strip())
    for name in sorted(set(extras) - set(FOR_DEVELOPERS)):
        lacking = sorted(set(_lacking(name, extras)))
        words = f"lacks {', '.join(lacking)}: pip install 'flowpolicy[{name}]'" if lacking else "installed"
        yield f"  {name:<{_LABEL - 2}}{words}"


def _lacking(extra: str, extras: dict[str, list[str]]) -> Iterator[str]:
    """Packages of an extra, and of those that it names, that are not installed or of another version."""
    for requirement in extras.get(extra, ()):
        found = _REQUIREMENT.match(requirement)
        if found is None:
            continue
        if found["name"] == "flowpolicy":
            for other in (found["extras"] or "").split(","):
                yield from _lacking(other.strip(), extras)
            continue
        try:
            version = metadata.version(found["name"])
        except metadata.PackageNotFoundError:
            yield found["name"]
            continue
        if not _fits(requirement, version):
            yield f"{requirement} (it is {version})"


def _fits(requirement: str, version: str) -> bool:
    """Whether a version is one that is asked for; nobody says so where ``packaging`` is not installed."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return True
    return bool(Requirement(requirement).specifier.contains(version, prereleases=True))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
