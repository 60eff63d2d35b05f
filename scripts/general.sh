#!/usr/bin/env bash
# Make weights/autoencoder from nothing: patches of free pictures in Debian's packages, training, float16, figures.
#   scripts/general.sh [DATA]        pictures go to DATA (data/general), the run to runs/general
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data/general}
photos="gnome-backgrounds mate-backgrounds plasma-workspace-wallpapers ukui-wallpapers lomiri-wallpapers-16.04 lomiri-wallpapers-20.04"
mkdir -p "$data/debian"
(cd "$data/debian" && apt-get download $photos openclipart-png supertuxkart-data tuxpaint-stamps-default)
for package in $photos; do dpkg-deb -x "$data/debian/${package}"_*.deb "$data/photos/$package"; done
for package in openclipart-png supertuxkart-data tuxpaint-stamps-default; do
  dpkg-deb -x "$data/debian/${package}"_*.deb "$data/$package"
done
python scripts/emoji.py "$data/emoji" --size 128
python scripts/patches.py "$data/patches" "$data/photos=36000" "$data/openclipart-png=12000" "$data/emoji/train=6000" \
  "$data/supertuxkart-data/usr/share/games/supertuxkart/data/tracks=8000" textures=3000
tinydiff train weights/autoencoder/tinydiff.toml --set "data.path=$data/patches" --run-dir runs/general --stage autoencoder
python - <<'END'
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tinydiff import config
from tinydiff.checkpoints import folder

run, file = Path("runs/general/autoencoder"), "diffusion_pytorch_model.safetensors"
recipe, table = config.load(Path("weights/autoencoder/tinydiff.toml")), json.loads((run / "config.json").read_text())
folder.save_network(Path("weights/autoencoder"), table, load_file(run / file), file, recipe, torch.float16)
END
unseen=$(mktemp -d)
python - "$unseen" <<'END'
import shutil, sys
from pathlib import Path

import skimage
import sklearn

names = "astronaut chelsea coffee motorcycle_left motorcycle_right grass gravel brick rocket hubble_deep_field".split()
photos = [p for p in (Path(skimage.__file__).parent / "data").iterdir() if p.stem in names]
for path in [*photos, *(Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg")]:
    shutil.copy(path, sys.argv[1])
END
python scripts/reconstructions.py general "$unseen" "$data/tuxpaint-stamps-default"
rm -r "$unseen"
