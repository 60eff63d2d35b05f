"""Print docs/samplers.md and draw docs/samplers.svg: how far each solver is from the exact solution after how many calls.

    PYTHONPATH=.:tests python scripts/samplers.py MODEL > docs/samplers.md

Twice: on a mixture of Gaussians whose x0 is known exactly, and on MODEL, the emoji model before it is distilled (`tinydiff train
weights/emoji/tinydiff.toml --stage denoiser --set generate.cfg_scale=2.5`: the recipe's own guidance is for afterwards), against
DDIM at all its 1,000 levels.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from pathlib import Path

import numpy as np

from tests.test_samplers import mixture_x0
from tinydiff.backends import find_model, open_backend
from tinydiff.checkpoints.source import Source
from tinydiff.diffusion.samplers import SAMPLERS
from tinydiff.diffusion.schedules import SCHEDULES, SPACINGS, sampling_levels
from tinydiff.pipeline import Request, denoise_latents

ROOT = Path(__file__).resolve().parents[1]
CALLS = (5, 10, 20, 40, 60)
SOLVERS = {  # name: order, network calls a step, when to use it
    "ddim": ("1", 1, "the reference; exact inversion"),
    "euler": ("1", 1, "the same steps as ddim, under the name people know"),
    "heun": ("2", 2, "EDM models, many steps"),
    "dpm2": ("2", 2, "as heun; asks the network between levels"),
    "dpm_solver_1": ("1", 1, "the same as ddim"),
    "dpm_solver_2": ("2", 1, "the paper's own, without guidance"),
    "dpm_solver_3": ("3", 1, "the same, at 20 steps and more"),
    "dpmpp_2m": ("2", 1, "close at few steps, and every tool has it"),
    "plms": ("2", 1, "what Stable Diffusion 1.x ships with; 20 steps and more; one call more than steps"),
    "lms": ("2, 4 inside", 1, "20 steps and more"),
    "deis": ("2, 3 inside", 1, "the default, with log_snr spacing: closest at 20 calls"),
    "unipc": ("2, 3 inside", 1, "as deis, with log_snr spacing"),
    "ddpm": ("stochastic", 1, "many steps: the training process run backwards"),
    "euler_ancestral": ("stochastic", 1, "the same steps as ddpm, under the name people know"),
    "dpmpp_2m_sde": ("stochastic", 1, "variety at moderate steps"),
    "dpmpp_3m_sde": ("stochastic", 1, "the same, more steps"),
    "dpmpp_sde": ("stochastic", 2, "the same, two calls a step"),
    "lcm": (
        "stochastic",
        1,
        "distilled models only (`tinydiff train --stage distill`, latent consistency models): one to eight steps",
    ),
}
DRAWN = ("ddim", "heun", "dpm2", "dpm_solver_2", "dpm_solver_3", "dpmpp_2m", "plms", "lms", "deis", "unipc")
SPACED = ("ddim", "dpmpp_2m", "deis", "unipc")
PALETTE = ("#111", "#c60", "#a80", "#2a7", "#074", "#d22", "#888", "#75c", "#28c", "#d3a")
PROMPTS = tuple((ROOT / "docs" / "gallery.txt").read_text().splitlines())


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square difference as a share of the exact result's deviation."""
    return float(np.sqrt(((found - exact) ** 2).mean()) / exact.std())


def middle(found: np.ndarray, exact: np.ndarray) -> float:
    """The median image's error: now and then one of them turns into another picture, which would drown the rest."""
    return float(np.median(np.sqrt(((found - exact) ** 2).mean(axis=(1, 2, 3)))) / exact.std())


def steps_for(name: str, calls: int) -> int:
    return max(1, calls // SOLVERS[name][1] - (name == "plms"))


def on_mixture(name: str, calls: int, spacing: str = "trailing") -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((64, 2))
    levels = sampling_levels(SCHEDULES["scaled_linear"](1000), steps_for(name, calls), spacing)
    return deque(SAMPLERS[name](mixture_x0, x, levels, lambda i: x), maxlen=1)[0][0]


class Model:
    """The emoji model drawing the same starts every time."""

    def __init__(self) -> None:
        self.backend = open_backend(Source(find_model(sys.argv[1])))
        self.d = self.backend.description

    def __call__(self, name: str, calls: int, spacing: str = "trailing") -> np.ndarray:
        request = Request(steps_for(name, calls), self.d.generate.cfg_scale, name, spacing, self.d.size, self.d.size)
        *_, x = denoise_latents(self.backend, PROMPTS, range(len(PROMPTS)), request, None, lambda step: None)
        print(f"{name} {calls} {spacing}", file=sys.stderr)
        return x


def panel(title: str, errors: dict[str, list[float]], left: int) -> str:
    """One chart as SVG: error against calls, both logarithmic, names at the right end of their lines."""
    width, height, top = 300, 300, 40
    values = [v for each in errors.values() for v in each]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def at(calls: float, value: float) -> tuple[float, float]:
        across = math.log(calls / CALLS[0]) / math.log(CALLS[-1] / CALLS[0])
        return left + width * across, top + height * (high - math.log10(value)) / (high - low)

    parts = [f'<text x="{left + width / 2}" y="20" text-anchor="middle" font-weight="bold">{title}</text>']
    for power in range(low, high + 1):
        y = at(CALLS[0], 10.0**power)[1]
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for calls in CALLS:
        x = at(calls, 1.0)[0]
        parts.append(f'<path d="M{x:.1f} {top}v{height}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{calls}</text>')
    ends = sorted((at(CALLS[-1], each[-1])[1], name) for name, each in errors.items())
    label = -math.inf
    for y, name in ends:
        colour, label = PALETTE[DRAWN.index(name)], max(y, label + 13)
        line = " ".join(f"{x:.1f},{v:.1f}" for x, v in map(at, CALLS, errors[name]))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(f'<text x="{left + width + 6}" y="{label + 4:.1f}" fill="{colour}">{name}</text>')
    return "\n".join(parts)


def figure(panels: dict[str, dict[str, list[float]]]) -> str:
    drawn = "\n".join(panel(title, errors, 60 + 460 * i) for i, (title, errors) in enumerate(panels.items()))
    style = 'font-family="sans-serif" font-size="12" style="background:#fff"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="920" height="380" {style}>\n{drawn}\n</svg>\n'


def main() -> None:
    model = Model()
    exact = {"mixture": on_mixture("ddim", 1000), "model": model("ddim", 1000)}
    errors = {
        "a mixture of Gaussians": {n: [error(on_mixture(n, c), exact["mixture"]) for c in CALLS] for n in DRAWN},
        "the emoji model": {n: [middle(model(n, c), exact["model"]) for c in CALLS] for n in DRAWN},
    }
    rows = {s: [middle(model(n, 20, s), exact["model"]) for n in SPACED] for s in SPACINGS}
    (ROOT / "docs" / "samplers.svg").write_text(figure(errors))
    print(TEXT.format(prompts=len(PROMPTS)))
    print("| sampler | order | calls a step | when |\n|---|---|---|---|")
    for name in SAMPLERS:
        order, calls, when = SOLVERS[name]
        print(f"| `{name}` | {order} | {calls} | {when} |")
    for title, found in errors.items():
        print(f"\nError on {title}:\n\n| calls | " + " | ".join(f"`{n}`" for n in DRAWN) + " |")
        print("|---" * (len(DRAWN) + 1) + "|")
        for i, calls in enumerate(CALLS):
            print(f"| {calls} | " + " | ".join(f"{found[n][i]:.2g}" for n in DRAWN) + " |")
    print(
        "\nError on the emoji model after 20 calls, by spacing:\n\n| spacing | "
        + " | ".join(f"`{n}`" for n in SPACED)
        + " |"
    )
    print("|---" * (len(SPACED) + 1) + "|")
    for spacing, row in rows.items():
        print(f"| `{spacing}` | " + " | ".join(f"{v:.2g}" for v in row) + " |")
    best, reference = rows["log_snr"][SPACED.index("deis")], errors["the emoji model"]["ddim"][CALLS.index(60)]
    print(f"\nThe default, `deis` with `log_snr` at 20 calls: {best:.2g}; `ddim` at 60 calls: {reference:.2g}.")


TEXT = """# Samplers

Printed by `scripts/samplers.py`, which also draws the figure. Every solver is a short function of
`tinydiff/diffusion/samplers.py`, held to its order on an exact mixture and to diffusers' scheduler of the same name by
`tests/test_samplers.py`.

![Error against network calls](samplers.svg)

The error is the root mean square difference from the exact solution, as a share of its deviation, with trailing spacing.
Left: a two-dimensional mixture of Gaussians, whose x0 is known, on Stable Diffusion's levels. Right: the latents of {prompts}
prompts under the guidance of the emoji model before it is distilled, the median one's. Exact is DDIM at all 1,000 levels. With
a clean last level nearly every solver ends on a first-order step; LMS and DEIS begin with one, so their order is that of a long
run. Stochastic solvers have no exact solution to be compared with.
"""


if __name__ == "__main__":
    main()
