"""Print docs/cli.md: the help screens of every command, as they are.

python scripts/cli_reference.py > docs/cli.md
"""

from __future__ import annotations

import os
import subprocess
import sys

COMMANDS = ("", "train", "generate", "export", "evaluate", "inspect")


def screen(command: str) -> str:
    """The help screen of a command at 100 columns."""
    env = os.environ | {"COLUMNS": "100", "TERM": "dumb"}
    words = [sys.executable, "-m", "tinydiff", *([command] if command else []), "--help"]
    text = subprocess.run(words, capture_output=True, text=True, env=env, check=True).stdout
    return text.replace("python -m tinydiff", "tinydiff").strip()


def main() -> None:
    print("# Command line\n\nPrinted by `scripts/cli_reference.py`; a test compares.")
    for command in COMMANDS:
        print(f"\n## tinydiff {command}".rstrip() + f"\n\n```\n{screen(command)}\n```")


if __name__ == "__main__":
    main()
