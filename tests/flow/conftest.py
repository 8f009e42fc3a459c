import sys
from pathlib import Path

# The exact fields are a plain module beside the tests.
sys.path.insert(0, str(Path(__file__).parent))
