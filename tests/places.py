"""Where things are, for tests at any depth."""
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
