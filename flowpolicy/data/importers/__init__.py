"""Other projects' demonstrations, brought into a store: list, choose, read only that, check, write.

``import_demonstrations`` gives them in memory, ``import_to_store`` writes them block by block; ``FORMATS``
lists what is known. A format is one small file, in this folder or in a project of your own: it lists the
columns that a source declares and gives ranges of their rows (``source``), under a name (``registry``).
Choosing, checking and writing stand once, in ``choosing``, ``columns`` and ``importing``.
"""

from flowpolicy.data.importers import (  # noqa: F401  (each enters itself in FORMATS)
    adroit,
    aloha,
    d4rl,
    diffusion_policy,
    lerobot,
    maniskill,
    minari,
    robomimic,
)
from flowpolicy.data.importers.importing import import_demonstrations, import_to_store
from flowpolicy.data.importers.registry import FORMATS, Contents, Importer, detect_format, importer
from flowpolicy.data.importers.request import Request
from flowpolicy.data.importers.source import ArraySource, Bounds, Feature, Source

__all__ = [
    "FORMATS",
    "ArraySource",
    "Bounds",
    "Contents",
    "Feature",
    "Importer",
    "Request",
    "Source",
    "detect_format",
    "import_demonstrations",
    "import_to_store",
    "importer",
]
