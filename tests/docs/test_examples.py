"""The examples of the pages run as they stand there, and change nothing but the folder they are in."""

from __future__ import annotations

import pytest
from pages import ROOT, Page, name, pages

EXAMPLES = [page for page in pages("docs/from_your_recording.md", "docs/extend/*.md") if page.commands]


@pytest.mark.parametrize("page", EXAMPLES, ids=name)
def test_the_example_of_a_page_runs(page, tmp_path, forking_python):
    page.run(tmp_path, forking_python)


EXAMPLE = """
```python title="package/greeting.py"
WORDS = "hello"
```

Then

```bash title="Run it"
python -c "from package.greeting import WORDS; print(WORDS)" > said.txt
```

1. and in a list

    ```bash title="Run it"
    test "$(cat said.txt)" = {expected}
    test -f scripts/pretrain.py
    ```
"""


def test_files_are_written_and_commands_run_among_them(tmp_path, forking_python):
    Page(ROOT / "page.md", EXAMPLE.format(expected="hello")).run(tmp_path, forking_python)
    assert (tmp_path / "package" / "greeting.py").read_text() == 'WORDS = "hello"\n'


def test_a_command_that_fails_fails_the_test(tmp_path, forking_python):
    with pytest.raises(AssertionError, match=r"page\.md: test"):
        Page(ROOT / "page.md", EXAMPLE.format(expected="goodbye")).run(tmp_path, forking_python)
