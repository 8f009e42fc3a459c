"""Say on a local page which of two segments is better: `python scripts/label_preferences.py pairs=STORE`."""

from pathlib import Path
from typing import Any

from flowpolicy.cli import script
from flowpolicy.preferences.page import LabelPage


@script("label_preferences")
def main(config: dict[str, Any], run_dir: Path) -> None:
    """Serve the page until Ctrl-C."""
    with LabelPage(config["pairs"], config["port"]) as page:
        print(
            f"{page.address} shows {len(page.pairs)} pairs, {len(page.answers.given)} labelled; Ctrl-C ends."
        )
        print(page.answers.path, flush=True)
        page.serve_forever()


if __name__ == "__main__":
    main()
