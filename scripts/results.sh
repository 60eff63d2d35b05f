#!/usr/bin/env bash
# Print the figures of docs/results.md: emoji from the shipped model; shapes from a run of the default tinydiff.toml.
#   scripts/results.sh [SHAPES_RUN]        emoji data is expected in data/emoji (scripts/emoji.py data/emoji --phrases)
set -euo pipefail
cd "$(dirname "$0")/.."
tinydiff evaluate --data data/emoji/train --data data/emoji/heldout --data data/emoji/paraphrased --count 256
if [ $# -gt 0 ]; then
  tinydiff evaluate "$1" --data shapes --count 500
fi
python scripts/bench.py
