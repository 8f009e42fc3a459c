"""The pages hold together: links and anchors resolve, paths and names exist, and every page opens alike."""

from __future__ import annotations

import importlib
import re

import pytest
from pages import ROOT, Page, name, pages

ALL = pages("*.md", "docs/**/*.md")
each_page = pytest.mark.parametrize("page", ALL, ids=name)
PATH = re.compile(r"(flowpolicy|envs|scripts|configs|tests|benchmarks|docs|\.ci|\.github)/[\w./*-]*")
DOTTED = re.compile(r"(flowpolicy|flowpolicy_envs)(\.\w+)+")


@each_page
def test_every_relative_link_and_image_leads_to_a_file_and_its_heading(page):
    for link in page.links:
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.path.parent / path).resolve()
        if path:
            assert target.exists(), f"{link} leads nowhere"
            target = Page.read(target) if target.suffix == ".md" else None
        assert not anchor or anchor in target.anchors, f"{link} names no heading; {sorted(target.anchors)}"


@each_page
def test_every_path_in_the_text_exists(page):
    for code in page.named_code:
        if PATH.fullmatch(code):
            assert any(ROOT.glob(code.rstrip("/"))), f"there is no {code}"


@each_page
def test_every_dotted_name_in_the_text_exists(page):
    for code in page.named_code:
        if DOTTED.fullmatch(code) and not (ROOT / code).exists():
            assert _found(code), f"there is no {code}"


def _found(dotted):
    """Whether a module has this name, or an attribute of one."""
    module, _, attribute = dotted.rpartition(".")
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        return bool(module) and hasattr(importlib.import_module(module), attribute)
    return True


@each_page
def test_code_is_not_wider_than_the_page(page):
    assert not [line for block in page.blocks for line in block.text.splitlines() if len(line) > 118]


@each_page
def test_every_fence_is_closed_and_names_its_language(page):
    assert not re.search(r"^ *```", page.prose, re.MULTILINE)
    assert all(block.language for block in page.blocks)


@pytest.mark.parametrize("page", pages("docs/**/*.md"), ids=name)
def test_a_page_opens_with_what_it_is_for_and_a_command(page):
    before_the_first_section = page.text.partition("\n## ")[0]
    heading, _, rest = before_the_first_section.partition("\n\n")
    assert heading.startswith("# ")
    assert re.match(r"[A-Z`]", rest), "a sentence comes first"
    opening = Page(page.path, before_the_first_section)
    assert any(block.language in ("bash", "console") for block in opening.blocks), "no command"
