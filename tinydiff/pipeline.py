"""Text to image over any backend: prompts in, uint8 images out.

It knows the four calls of `Backend` and numpy, no torch and no onnxruntime. The start of every image is drawn from its
own seed, so an image does not depend on its batch or on the backend.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from tinydiff import condition, control, images, tiling
from tinydiff.checkpoints.description import Description
from tinydiff.condition import Condition
from tinydiff.control import Control
from tinydiff.diffusion import guidance, noise
from tinydiff.diffusion.predictions import PREDICTIONS
from tinydiff.diffusion.samplers import SAMPLERS, Denoise, Sampler
from tinydiff.diffusion.schedules import Level, Levels
from tinydiff.editing import Edit, cells
from tinydiff.errors import DivergedError, UsageError
from tinydiff.networks.network import Canvas, Given
from tinydiff.text.prompts import Branch, Piece, Tokens

Prompt = str | Sequence[Branch]
OTHER_AUTOENCODER = "use fp32 weights, or the autoencoder of another file (--vae)"


class Backend(Protocol):
    """A model ready to run; arrays are numpy float32."""

    name: str
    description: Description
    at_once: int  # how many batches are drawn fastest at once, by threads

    @property
    def tokenizers(self) -> Mapping[str, Tokens]:
        """By text encoder, at least one."""
        ...

    def encode_text(self, ids: Mapping[str, np.ndarray]) -> Condition:
        """Token ids (B, T) int64 by text encoder -> what the denoiser is told of them."""
        ...

    def denoise(self, x: np.ndarray, t: float, condition: Condition) -> np.ndarray:
        """x (B, C, h, w), a condition of B rows -> the network's output, like x."""
        ...

    def control(self, network: str, x: np.ndarray, t: float, condition: Condition) -> Condition:
        """What a control network adds to the denoiser's features, by name: arrays that know + and *, a row one of x."""
        ...

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """(B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w)."""
        ...

    def decode(self, z: np.ndarray) -> np.ndarray:
        """(B, C, h, w), already divided by the scaling factor -> (B, 3, H, W)."""
        ...


@dataclass(frozen=True)
class Request:
    """How to draw; the prompts and seeds come beside it."""

    steps: int
    cfg_scale: float
    sampler: str
    spacing: str
    width: int
    height: int
    cfg_max: float | None = None  # guidance at the clean end, where it grows
    cfg_complex: float | None = None  # guidance of the most complex prompt, where it depends on the prompt
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # where there is guidance, as shares of the noise levels
    cfg_rescale: float = 0.0
    eta: float | None = None  # new noise at each step, of samplers in `samplers.ETA`; None for the sampler's own
    original_size: tuple[int, int] | None = None  # width, height of the picture that it is said to be a crop of
    crop: tuple[int, int] = (0, 0)  # from its left and top

    @property
    def solver(self) -> Sampler:
        """The sampler, with its eta."""
        solver: Any = SAMPLERS[self.sampler]
        return solver if self.eta is None else partial(solver, eta=self.eta)

    def canvas(self) -> Canvas:
        """The request as a denoiser is told it."""
        (left, top), size = self.crop, self.original_size
        return Canvas(self.height, self.width, self.cfg_scale, size and (size[1], size[0]), (top, left))

    @property
    def guided(self) -> bool:
        """Whether there is any guidance, which begins above a scale of 1."""
        return max(self.cfg_scale, self.cfg_max or 0, self.cfg_complex or 0) > 1


def check_size(description: Description, width: int, height: int) -> None:
    """UsageError naming the nearest sizes where the model cannot draw this one."""
    m = description.multiple
    for name, value in (("width", width), ("height", height)):
        low = max(m, value // m * m)
        if value != low:
            problem = f"{name} {value} is no multiple of {m}, which this model needs"
            raise UsageError(f"{problem}; nearest are {low} and {low + m}")


def generate(
    backend: Backend,
    prompts: Sequence[Prompt],
    seeds: Sequence[noise.Seed],
    request: Request,
    negatives: Sequence[Prompt] | None = None,
    on_step: Callable[[int], Any] = lambda step: None,
    edit: Edit | None = None,
    controls: Sequence[Control] = (),
    spent: Spent | None = None,
    given: Condition | None = None,
) -> np.ndarray:
    """One image a prompt: uint8 (B, H, W, 3). `seeds` key the noise; `on_step` hears of every finished step.

    A prompt, negative or not, is plain text, or what `text.prompts.parse` makes of one with weights and ANDs. With an
    `edit` its image, of the request's size, is changed: below one step's strength it goes through the autoencoder and back,
    at 1 only a mask keeps any of it. Images of `controls` have the request's size too. `given`: what `given_with`
    makes of a class and of another image, one row for all images or one each. Raises UsageError for a size the model
    cannot draw, and DivergedError naming the part of the model that gives NaN or infinite values.
    """
    d = backend.description
    check_size(d, request.width, request.height)
    with np.errstate(all="ignore"):  # `finite` reports what numpy would warn of
        (x,) = deque(
            denoise_latents(backend, prompts, seeds, request, negatives, on_step, edit, controls, spent, given),
            maxlen=1,
        )
        pixels = decoded(backend, x / np.float32(d.scaling_factor))
    drawn = images.to_uint8(pixels)
    return edit.over(drawn) if edit else drawn


def denoise_latents(
    backend: Backend,
    prompts: Sequence[Prompt],
    seeds: Sequence[noise.Seed],
    request: Request,
    negatives: Sequence[Prompt] | None,
    on_step: Callable[[int], Any],
    edit: Edit | None = None,
    controls: Sequence[Control] = (),
    spent: Spent | None = None,
    given: Condition | None = None,
) -> Iterator[np.ndarray]:
    """The latents at the start and after each step, float32 (B, C, h, w)."""
    d = backend.description
    shape = (d.latent_channels, request.height // d.factor, request.width // d.factor)
    levels = d.levels(request.sampler, request.steps, request.spacing)
    if edit:
        levels = Levels(levels[-1 - edit.steps(len(levels) - 1) :], levels.at)
    beside = concatenated(backend, edit, shape)
    added = partial(control.residuals, backend, controls, levels) if controls else None
    denoise = guided(backend, prompts, negatives or [""] * len(prompts), request, beside, added, spent, given or {})
    x = noise.normal(seeds, shape)
    if edit:
        known = latents(backend, images.to_pixels(edit.image[None]))
        if edit.mask is not None and beside is None:
            denoise = guidance.keeping(denoise, known, cells(edit.mask, d.factor))
        # SDEdit (Meng et al. 2022, algorithm 1), but for a start of noise alone where nothing of the image is to stay
        x = x * levels[0].sigma + (known * levels[0].alpha if edit.strength < 1 else 0)
        x = x if len(levels) > 1 else np.repeat(known, len(seeds), axis=0)  # the last level may still have noise
    else:
        x = x * levels[0].sigma
    yield x
    sampler = request.solver(denoise, x, levels, lambda step: noise.normal(seeds, shape, step + 1))
    for step, (x, _) in enumerate(sampler):
        fix = "use fp32 weights, a lower --cfg-scale or smaller weights in the prompt"
        finite(x, f"the denoiser at step {step + 1} of {len(levels) - 1}", fix)
        if spent:
            spent.step()
        on_step(step + 1)
        yield x


def finite(array: np.ndarray, part: str, fix: str) -> np.ndarray:
    """The array. Raises DivergedError naming the `part` of the model that gave it and the fix, if not all is finite."""
    if not np.isfinite(array).all():
        raise DivergedError(f"{part} gives NaN or infinite values; {fix}")
    return array


def latents(backend: Backend, pixels: np.ndarray) -> np.ndarray:
    """The scaled mean latents (B, C, h, w) float32 of images (B, 3, H, W) in [-1, 1]."""
    d = backend.description
    moments = tiling.encode(backend.encode_image, pixels, d.factor)[:, : d.latent_channels]
    return finite(moments * np.float32(d.scaling_factor), "the autoencoder's encoder", OTHER_AUTOENCODER)


def given_with(backend: Backend, label: str | None = None, image: np.ndarray | None = None) -> Condition:
    """What a model is told of a class's label and of another image uint8 (H, W, 3), of those that it is told: a row each.

    Raises UsageError for an unknown label.
    """
    d, made = backend.description, Condition()
    for name, array in d.given.items():
        if array.of == Given("label") and label is not None and d.labels:
            (number,) = d.labels.encode([label])[:, 0]
            made[name] = np.zeros((1, int(array.axes[1])), np.float32)
            made[name][0, number] = 1
        elif array.of == Given("image") and image is not None:
            made[name] = latents(backend, images.to_pixels(image[None]))
    return made


def decoded(backend: Backend, z: np.ndarray) -> np.ndarray:
    """The images (B, 3, H, W) of latents (B, C, h, w), already divided by the scaling factor."""
    pixels = tiling.decode(backend.decode, z, backend.description.factor)
    return finite(pixels, "the autoencoder's decoder", OTHER_AUTOENCODER)


def concatenated(backend: Backend, edit: Edit | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """What an inpainting model reads beside x: the mask and the masked image's latents (1, 1 + C, h, w); else None.

    It learnt masks of 0 and 1, so a soft one is cut at a half, and a cell is told its first pixel: as diffusers does.
    """
    d = backend.description
    if d.in_channels == d.latent_channels:
        return None
    mask = np.ones((shape[1] * d.factor, shape[2] * d.factor), bool)  # everything is drawn where no mask says
    pixels = np.zeros((1, 3, *mask.shape), np.float32)  # grey
    if edit and edit.mask is not None:
        mask = edit.mask >= 0.5
        pixels = images.to_pixels(edit.image[None]) * ~mask
    told = mask[None, None, :: d.factor, :: d.factor].astype(np.float32)
    return np.concatenate([told, latents(backend, pixels)], axis=1)


def guided(
    backend: Backend,
    prompts: Sequence[Prompt],
    negatives: Sequence[Prompt],
    request: Request,
    beside: np.ndarray | None = None,  # (1, C', h, w), concatenated to what the network reads
    added: Callable[[np.ndarray, Level, Condition], Condition] | None = None,  # what else it is told at each level
    spent: Spent | None = None,
    given: Condition = {},  # noqa: B006  what is told with the images
) -> Denoise:
    """The denoiser (x, level) -> x0 under the request's guidance; where that is 1, the prompt alone is asked."""
    d, count = backend.description, len(prompts)
    wanted, unwanted = Rows(prompts), Rows(negatives)
    strength = 1.0 if d.told_guidance else scale(request, wanted.branches, len(d.schedule))
    unguided = wanted.alone and isinstance(strength, float) and strength == 1
    rows = [wanted] if unguided else [unwanted, wanted] if unwanted.alone else [Rows([""] * count), unwanted, wanted]
    told = condition.of_branches(backend, [branch for each in rows for parts in each.branches for branch in parts])
    for array in told.values():
        finite(array, "the text encoder", "use fp32 weights, or smaller weights in the prompt")
    if d.zero_empty:
        empty = [each is not wanted and not branch.text for each in rows for parts in each.branches for branch in parts]
        for array in told.values():
            array[empty] = 0
    told |= condition.of_canvas(d.conditions, request.canvas(), sum(len(each.image) for each in rows))
    shape = (d.latent_channels, request.height // d.factor, request.width // d.factor)
    told |= condition.of_given(d, given, shape, [(each.image, each is wanted) for each in rows])
    to_x0 = PREDICTIONS[d.prediction].to_x0

    def ask(x: np.ndarray, level: Level, told: Condition, images: Sequence[int]) -> np.ndarray:
        told = told | added(x, level, told) if added else told
        read = x if beside is None else np.concatenate([x, np.repeat(beside, len(x), axis=0)], axis=1)
        answer = backend.denoise(read, level.t, told)
        if spent:
            spent.asked(images)
        return to_x0(answer, x, level.alpha, level.sigma)

    def both(x: np.ndarray, level: Level) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum([len(each.image) for each in rows])
        of = [i for each in rows for i in each.image]
        answers, u, c = np.split(ask(x[of], level, told, of), ends), x, x
        for each, x0 in zip(rows, answers, strict=False):
            u, c = c, each.composed(x0, c)
        return u, c

    plainly = {name: array[-count:] for name, array in told.items()}
    one = partial(ask, told=plainly, images=range(count)) if wanted.alone else None
    share = request.cfg_rescale
    adjust = guidance.rescale(PREDICTIONS[d.prediction], share) if share else guidance.unadjusted
    return guidance.classifier_free(both, strength, one, adjust)


class Spent:
    """The share of the denoiser's blocks that each image took at each step, `steps` (steps, B), where `shares` tells it of the
    rows of a call."""

    def __init__(self, shares: Callable[[], np.ndarray], count: int):
        self.shares, self.sums, self.steps = shares, np.zeros((2, count)), list[np.ndarray]()

    def asked(self, images: Sequence[int]) -> None:
        """Told after every call, whose rows are of these images."""
        self.sums += np.stack([np.bincount(images, each, self.sums.shape[1]) for each in (self.shares(), None)])

    def step(self) -> None:
        """Told at the end of every step."""
        self.steps.append(self.sums[0] / self.sums[1])
        self.sums[:] = 0


class Rows:
    """The prompts of a batch, or the negative ones, as rows of a network call: one for each branch."""

    def __init__(self, prompts: Sequence[Prompt]):
        self.branches = [[plain(prompt)] if isinstance(prompt, str) else prompt for prompt in prompts]
        self.image = [i for i, parts in enumerate(self.branches) for _ in parts]  # the one of each row
        self.weights = [branch.weight for parts in self.branches for branch in parts]
        self.alone = len(self.image) == len(prompts) and set(self.weights) == {1.0}  # no ANDs

    def composed(self, c: np.ndarray, u: np.ndarray) -> np.ndarray:
        """One x0 an image, of the rows' own x0 `c`: themselves, or by their weights' composition upon each image's `u`."""
        if self.alone:
            return c
        parts = [[(w, c[j]) for j, w in enumerate(self.weights) if self.image[j] == i] for i in range(len(u))]
        return np.stack([guidance.composed(u[i], part) for i, part in enumerate(parts)])


def scale(request: Request, branches: Sequence[Sequence[Branch]], levels: int) -> guidance.Scale:
    """How strong guidance is: a number, or a function of the level that gives a number or one an image.

    There is none at a scale of 1, nor below it, as in diffusers: distilled models are drawn with 0.
    """
    base: Any = max(1.0, request.cfg_scale)
    if request.cfg_complex is not None:
        shares = [guidance.complexity(" ".join(branch.text for branch in parts).split()) for parts in branches]
        base = (base + (max(1.0, request.cfg_complex) - base) * np.array(shares, np.float32))[:, None, None, None]
    strength = base if request.cfg_max is None else guidance.growing(base, max(1.0, request.cfg_max), levels)
    all_levels = request.cfg_interval == (0.0, 1.0)
    return strength if all_levels else guidance.within(strength, *request.cfg_interval, levels)


def plain(text: str) -> Branch:
    """A text as its own words, whatever brackets it has."""
    return Branch((Piece(text, 1.0),), 1.0)
