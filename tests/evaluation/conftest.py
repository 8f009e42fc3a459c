import sys
from pathlib import Path

# Worker processes import the toys by name, so they must be importable as a plain module.
sys.path.insert(0, str(Path(__file__).parent))
