#!/usr/bin/env bash
# Draw docs/gallery.png, sixteen prompts through the shipped model, and docs/edits.png, what the README does to images.
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
Path("docs/gallery.png").write_bytes(images.encode_png(images.grid(tiles, 8, 8), None))
END
sed -n '/<!-- edits -->/,/^```$/p' README.md | grep -v -e '^<!--' -e '^```' > "$folder/edits.sh"
(cd "$folder" && bash -euo pipefail edits.sh)
python - "$folder" <<'END'
import sys
from pathlib import Path
import numpy as np
from tinydiff import images
rows = [images.open_image(Path(sys.argv[1]) / f"{n}.png") for n in ("fire", "space", "red", "half", "wide", "way")]
gap = np.full((128, 12, 3), 255, np.uint8)
row = np.concatenate([part for image in rows for part in (image, gap)][:-1], axis=1)
Path("docs/edits.png").write_bytes(images.encode_png(row, None))
END
