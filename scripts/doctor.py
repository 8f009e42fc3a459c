"""Show what is installed and what works here, on one screen: python scripts/doctor.py."""

from __future__ import annotations

import sys


def main() -> None:
    """Print the report; unlike the other commands it has no settings and needs no extra."""
    if sys.argv[1:] and sys.argv[1:] not in (["-h"], ["--help"]):
        raise SystemExit(f"doctor takes no settings, and '{sys.argv[1]}' is one; leave it out.")
    if sys.argv[1:]:
        program = sys.argv[0] if not sys.argv[0].endswith(".py") else f"python {sys.argv[0]}"
        print(f"Usage: {program} [--help]\n\n{__doc__}")
        return
    from flowpolicy.doctor import report

    print(report())


if __name__ == "__main__":
    main()
