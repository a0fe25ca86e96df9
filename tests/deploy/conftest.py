"""Put the repository's root on the path, as deploy/ is not part of the wheel."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
