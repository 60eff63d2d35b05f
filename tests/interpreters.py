"""Fresh Python processes: the environment they get, and programs in which some modules cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


PATHS = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]


ENV = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}


# Looked up first, before any finder: a module of these names cannot be imported, installed or not.
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Blocked())
"""


def without(code: str, *blocked: str) -> str:
    """A program: the code, where none of `blocked` can be imported."""
    return f"BLOCKED = {blocked!r}\n{BLOCK}\n{code}"


def run_without(code: str, *blocked: str) -> str:
    """What the code prints in a fresh interpreter that cannot import `blocked`."""
    command = [sys.executable, "-c", without(code, *blocked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV)
    assert done.returncode == 0, done.stderr
    return done.stdout
