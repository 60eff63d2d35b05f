"""What the pipeline needs to control a picture by images (ControlNet, Zhang et al. 2023): which network is told which image, how
strongly, and over which steps; and what the networks add to the denoiser. Of a model only sizes are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinydiff import images
from tinydiff.condition import Condition
from tinydiff.data.makers import MAKERS
from tinydiff.diffusion.schedules import Level, Levels
from tinydiff.errors import ModelError, UsageError
from tinydiff.files import RESTORE, shown
from tinydiff.networks.control import IMAGE

if TYPE_CHECKING:
    from tinydiff.pipeline import Backend

WANTED = (
    "give FOLDER:IMAGE, FOLDER:IMAGE:STRENGTH or FOLDER:IMAGE:STRENGTH:START,END, such as canny:edges.png:0.7:0,0.5"
)
RANGES = "a strength is a number from 0 to 10, and START,END are shares of the steps, 0 <= START < END <= 1"
NUMBER = r"\d+(?:\.\d+)?|\.\d+"
FLAG = re.compile(rf"([^:]+):(.+?)(?::({NUMBER})(?::({NUMBER}),({NUMBER}))?)?")


class Flag(NamedTuple):
    """What --control asks for: a network, an image, how strong it is, and the share of the steps where it begins and ends."""

    network: Path = Path()
    image: Path = Path()
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0


def parse(text: str) -> Flag:
    """ "FOLDER:IMAGE[:STRENGTH[:START,END]]"; UsageError for anything else."""
    match = FLAG.fullmatch(text)
    if match is None:
        raise UsageError(f"--control {shown(text)}: not understood; {WANTED}")
    network, image, *numbers = match.groups()
    flag = Flag(Path(network), Path(image), *(float(number) for number in numbers if number is not None))
    if not flag.start < flag.end <= 1 or flag.strength > 10:
        raise UsageError(f"--control {shown(text)}: {RANGES}")
    return flag


@dataclass(frozen=True)
class Control:
    """A control network by its folder's name in the model, its image uint8 (H, W, 3), and what was asked for."""

    network: str
    image: np.ndarray
    asked: Flag = Flag()

    @property
    def settings(self) -> dict[str, Any]:
        """What an image's settings say of it."""
        maker, path = made(self.asked.image)
        image = f"{maker}={path.name}" if maker else path.name
        return self.asked._asdict() | {"network": self.asked.network.name, "image": image}

    def acts(self, step: int, steps: int) -> bool:
        """Whether it does at a step, as diffusers' `control_guidance_start` and `_end` have it."""
        return step / steps >= self.asked.start and (step + 1) / steps <= self.asked.end


def read(flag: Flag, network: str, size: tuple[int, int], fit: bool) -> Control:
    """A Control from a file, scaled and cropped to `size` (width, height) if `fit`; UsageError where it has another size."""
    maker, path = made(flag.image)
    image = images.open_image(path)
    image = images.fit(image, size) if fit else image
    height, width = image.shape[:2]
    if (width, height) != size:
        problem = f"the control image is {width}x{height} and the picture {size[0]}x{size[1]}"
        raise UsageError(f"{shown(flag.image)}: {problem}; make them equal with -W and -H, or use --fit")
    return Control(network, MAKERS[maker](image) if maker else image, flag)


def made(image: Path) -> tuple[str, Path]:
    """The maker of a control image, "" for none, and the file that it is made of: of edges=photo.png."""
    maker, _, rest = str(image).partition("=")
    return (maker, Path(rest)) if maker in MAKERS and rest else ("", image)


def as_condition(images: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W, 3) as control networks are told it: float32 (B, 3, H, W) in [0, 1]."""
    return np.moveaxis(images, -1, 1).astype(np.float32) / np.float32(255)


def residuals(
    backend: Backend, controls: Sequence[Control], levels: Levels, x: np.ndarray, level: Level, told: Condition
) -> Condition:
    """What control networks add to the denoiser at a level, summed; nothing where none acts. Every row is told the image.

    The step of a level that a solver asks for between two is that of the noisier one. Raises ModelError naming a network that
    makes NaN or infinite values of an x without any.
    """
    steps, added = len(levels) - 1, dict[str, Any]()
    step = max(0, sum(each.t >= level.t for each in levels[:-1]) - 1)
    for control in controls:
        if control.acts(step, steps):
            given = told | {IMAGE: np.repeat(as_condition(control.image[None]), len(x), axis=0)}
            answer: dict[str, Any] = backend.control(control.network, x, level.t, given)
            if not all(math.isfinite(abs(array).max()) for array in answer.values()) and np.isfinite(x).all():
                problem = "this control network gives NaN or infinite values"
                raise ModelError(f"{shown(control.asked.network)}: {problem}; {RESTORE}, or use fp32 weights")
            for name, array in answer.items():
                array = array * control.asked.strength
                added[name] = added[name] + array if name in added else array
    return added
