import sys
from pathlib import Path

# Programs that tests start import the toys by name.
sys.path.insert(0, str(Path(__file__).parent))
