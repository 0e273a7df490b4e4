"""Puts the repository root first on the import path, whatever folder pytest was started from."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
