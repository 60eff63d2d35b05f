"""Self-attention over a map of tokens, without torch: what settings say of it, and what of them does not go together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

ATTENTIONS = ("full", "window", "strided", "gated")
POSITIONS = ("none", "sine", "learned", "relative")


class Spatial(NamedTuple):
    """One self-attention: its kind, whether its windows are shifted, what its tokens are told of their places."""

    kind: str = "full"
    shifted: bool = False
    positions: str = "none"
    base: int = 1  # cells along a side of the square that positions are on
    width: int = 0  # of sines, which are repeated to that of the tokens; 0: theirs
    window: int = 1
    stride: int = 1
    learn_frequencies: bool = False


def spatial(settings: Any, kind: str, block: int, positions: str, base: int) -> Spatial:
    """That of the n-th `block` of its row: every other one has its windows shifted."""
    sizes = settings.window, settings.stride, settings.learn_frequencies
    return Spatial(kind, block % 2 == 1, positions, base, 0, *sizes)


def misfits(settings: Any, maps: Iterable[tuple[str, int, int]]) -> Iterator[str]:
    """Conflicts between these keys where maps have these kinds of attention, tokens a side, and widths."""
    for kind, side, width in maps:
        for name in [name for row, name in (("window", "window"), ("strided", "stride")) if row == kind]:
            if (size := getattr(settings, name)) > side:
                yield f"{name}: {size} is more than the {side} tokens a side where attention is {kind}"
        if settings.positions == "sine" and width % 4:
            yield f"positions: sine needs widths that are multiples of 4, and {width} is none; set learned or relative"
    if settings.learn_frequencies and settings.positions != "sine":
        yield f"learn_frequencies: only positions sine has frequencies, and positions is {settings.positions}"
