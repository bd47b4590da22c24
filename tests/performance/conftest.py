"""The study's modules are those of a script: they are found beside it."""

import sys
from pathlib import Path

STUDY = Path(__file__).parents[2] / "experiments" / "performance"
sys.path.insert(0, str(STUDY))
