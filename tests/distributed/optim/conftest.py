"""The ranks of these tests import their functions by module name, so this folder goes on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
