"""The shipped emoji model tuned to 200 other pictures, against a run from nothing: a table with the processor's time.

`python scripts/finetune.py STAMPS FOLDER` takes the pictures of Debian's tuxpaint-stamps-default (STAMPS is its
usr/share/tuxpaint/stamps), and trains and draws in FOLDER: all of the model, its layers' changes of rank 8, and the same
networks from nothing on the model's autoencoder, each on one thread. All are drawn in 10 steps with guidance 2.5, which the
shipped model, distilled to 4 calls, learns to need again. A score is the share of captions whose picture is the nearest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

from PIL import Image

HOME = Path(__file__).resolve().parents[1]
COUNT, SIDE, LEAST = 200, 128, 40  # pictures, their pixels, and those that a stamp must have
DRAWN = {"sampler": "deis", "steps": 10, "cfg_scale": 2.5, "spacing": "log_snr"}
USUAL = {"batch_size": 16, "warmup": 20, "ema": 0.99, "sample_every": 10**6, "save_every": 10**6}
RUNS = {  # name: what it begins with, its stage, and keys of that
    "tuned": (["--from", "emoji"], "denoiser", {"steps": 600, "lr": 6e-4}),
    "lora": (["--from", "emoji", "--adapter", "lora"], "lora", {}),  # as it is by default
    "nothing": (
        [f"{HOME}/weights/emoji/tinydiff.toml", "--set", f"autoencoder.path={HOME}/weights/emoji"],
        "denoiser",
        {"steps": 310, "optimizer": "muon", "lr": 2.5e-3},  # the default recipe; as long as `tuned`
    ),
}


def stamps(place: Path, out: Path) -> None:
    """Captioned squares on white: each English caption once, in an order of a seed."""
    found: dict[str, Path] = {}
    for text in sorted(place.rglob("*.txt")):
        caption = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
        if caption and "=" not in caption and len(caption) < 100 and text.with_suffix(".png").is_file():
            found.setdefault(caption, text.with_suffix(".png"))
    captions, rows = sorted(found), list[dict[str, str]]()
    random.Random(0).shuffle(captions)
    out.mkdir(parents=True, exist_ok=True)
    for caption in captions:
        image = Image.open(found[caption]).convert("RGBA")
        if min(image.size) >= LEAST and len(rows) < COUNT:
            white = Image.new("RGBA", (max(image.size),) * 2, "white")
            white.alpha_composite(image, tuple((max(image.size) - side) // 2 for side in image.size))
            name = f"{len(rows):03d}.png"
            white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(out / name)
            rows.append({"file_name": name, "text": caption})
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tinydiff(folder: Path, *words: object) -> tuple[str, float]:
    """What the command prints in a folder, where no tinydiff.toml says more, and the processor's seconds that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}
    command = [sys.executable, "-m", "tinydiff", *map(str, words)]
    done = subprocess.run(command, env=env, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=RUNS, nargs="*", default=[*RUNS])
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    data = folder / "stamps"
    stamps(arguments.stamps, data)
    common = {"data.path": data, "data.resolution": SIDE, "data.held_out": 0, "train.threads": 1}
    common |= {"train.validation_samples": 0, "train.autoencoder.steps": 0, "train.distill.steps": 0}
    common |= {f"generate.{key}": value for key, value in DRAWN.items()}
    drawn = [word for key, value in DRAWN.items() for word in (f"--{key.replace('_', '-')}", value)]
    print("run       seconds  bytes       nearest  among five")
    for name in arguments.only:
        begin, stage, own = RUNS[name]
        keys = common | {f"train.{stage}.{key}": value for key, value in (USUAL | own).items()}
        sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        run, seconds = tinydiff(folder, "train", *begin, "--run-dir", folder / name, *sets)
        model = Path(run.strip())
        size = sum(path.stat().st_size for path in model.rglob("*.safetensors"))
        asked = ("--data", data, "--count", COUNT, "--features", "none", *drawn, "--json")
        told, _ = tinydiff(folder, "evaluate", model, *asked)
        score = json.loads(told)
        print(
            f"{name:<9} {seconds:7.0f}  {size:<10}  {score['nearest_top1']:7.1%}  {score['nearest_top5']:10.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
