#!/usr/bin/env bash
# Draw docs/gallery.png: sixteen prompts through the shipped model, with fixed seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tinydiff generate - -o "$folder/" -s 100 < docs/gallery.txt
python - "$folder" <<'END'
import sys
from pathlib import Path
import numpy as np
from tinydiff import images
tiles = np.stack([images.open_image(p) for p in sorted(Path(sys.argv[1]).glob("*.png"))])
Path("docs/gallery.png").write_bytes(images.encode_png(images.grid(np.kron(tiles, np.ones((1, 2, 2, 1), np.uint8)), 8, 8), None))
END
