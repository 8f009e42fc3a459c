"""The pages of the documentation as data: code, headings and links, and how the example of a page is run.

A block of a page that has a title is part of the page's example: its title names the file that it is, and a
block of bash titled RUN holds commands that are run among those files.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from forking_python import EMPTY_FIGURES

ROOT = Path(__file__).resolve().parents[2]
RUN = "Run it"
CHECKOUT = ("scripts", "configs", "benchmarks")  # what the commands of a page expect beside them

_BLOCK = re.compile(
    r'^(?P<indent> *)(?P<fence>`{3,})(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n'
    r"(?P<text>.*?)^(?P=indent)(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)
_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of code; its title is empty where it has none."""

    language: str
    title: str
    text: str


@dataclass(frozen=True)
class Page:
    """A page by its text.

    Attributes:
        path: its file, for links that start there.
        text: Markdown.
    """

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        """The page in a file."""
        return cls(path, path.read_text(encoding="utf-8"))

    @property
    def blocks(self) -> list[Block]:
        """In the order of the page."""
        return [
            Block(found["language"], found["title"] or "", textwrap.dedent(found["text"]))
            for found in _BLOCK.finditer(self.text)
        ]

    @property
    def prose(self) -> str:
        """The text without its blocks."""
        return _BLOCK.sub("", self.text)

    @property
    def named_code(self) -> list[str]:
        """What the prose sets as code."""
        return [code.strip("`") for code in _CODE.findall(self.prose)]

    @property
    def links(self) -> list[str]:
        """Targets of links and images."""
        return _LINK.findall(_CODE.sub("", self.prose))

    @property
    def anchors(self) -> set[str]:
        """What links may point to after a '#': the headings, as GitHub and the site write them."""
        headings = re.findall(r"^#+ +(.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}

    @property
    def files(self) -> dict[str, str]:
        """The files of the page's example, by name."""
        titled = [block for block in self.blocks if block.title and block.title != RUN]
        files = {block.title: block.text for block in titled}
        assert len(files) == len(titled), f"{self.path.name} has two files of one name"
        return files

    @property
    def commands(self) -> list[str]:
        """The blocks of commands that the page's example runs."""
        return [block.text for block in self.blocks if block.title == RUN]

    def write_files(self, folder: Path) -> None:
        """Write the example's files into ``folder``."""
        for name, text in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

    def run(self, folder: Path, python: Path) -> None:
        """Run the example as a reader would who keeps its files in ``folder``, beside the checkout's.

        ``python`` is the program of this name that the commands find.
        """
        self.write_files(folder)
        for name in CHECKOUT:
            (folder / name).symlink_to(ROOT / name)
        command = folder / ".bin" / "flowpolicy"  # the one that is installed, of this checkout and python
        command.parent.mkdir()
        command.write_text('#!/bin/sh\nexec python -m flowpolicy "$@"\n')
        command.chmod(0o755)
        path = f"{python.parent}:{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, EMPTY_FIGURES: "1", "OMP_NUM_THREADS": "1", "PATH": path}
        for command in self.commands:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment,
                capture_output=True, text=True, timeout=250, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{self.path.name}: {command}\n{done.stdout}\n{done.stderr}"


def pages(*patterns: str) -> list[Page]:
    """The pages that match; a distribution without documentation has none."""
    return [Page.read(path) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def name(page: Page) -> str:
    """Its path, as the tests' names have it."""
    return str(page.path.relative_to(ROOT))
