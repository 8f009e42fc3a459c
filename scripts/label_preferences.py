"""Say on a local page which of two segments is better: `python scripts/label_preferences.py pairs=STORE`."""

import contextlib
from pathlib import Path
from typing import Any

from flowpolicy.cli import script
from flowpolicy.preferences.page import LabelConfig, LabelPage
from flowpolicy.settings import build


@script("label_preferences")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Serve the page until Ctrl-C."""
    del config["run_dir"]
    with LabelPage(build(LabelConfig, config, "")) as page:
        print(f"{len(page.answers.given)} of {len(page.pairs)} pairs are labelled; Ctrl-C ends.")
        print(page.address, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            page.serve_forever()
        print(page.answers.path)


if __name__ == "__main__":
    main()
