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
python scripts/emoji.py "$data/emoji"
python scripts/patches.py "$data/patches" "$data/photos=36000" "$data/openclipart-png=12000" "$data/emoji/train=6000" \
  "$data/supertuxkart-data/usr/share/games/supertuxkart/data/tracks=8000" textures=3000
train() { tinydiff train weights/autoencoder/tinydiff.toml --set "data.path=$data/patches" --stage autoencoder "$@"; }
train --run-dir runs/general
# Then on, with the distance of features as a loss, which by itself would not teach colours and places.
train --run-dir runs/general-perceptual --set autoencoder.path=runs/general --set train.autoencoder.perceptual_weight=0.2 \
  --set train.autoencoder.steps=1200 --set train.autoencoder.lr=0.002 --set train.autoencoder.ema=0.998
python - <<'END'
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from tinydiff import config
from tinydiff.checkpoints import folder

run, half, place = Path("runs/general-perceptual/autoencoder"), Path("runs/general-half"), Path("weights/autoencoder")
file, recipe = "diffusion_pytorch_model.safetensors", config.load(place / "tinydiff.toml")
folder.save_network(half, json.loads((run / "config.json").read_text()), load_file(run / file), file, recipe, torch.float16)
shutil.copytree(half, place, dirs_exist_ok=True)  # beside README.md
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
