"""What a denoiser becomes while it is trained (Chen et al. 2016, Net2Net), without torch: an entry of `train.grow`."""

from __future__ import annotations

from dataclasses import dataclass

from tinydiff.schema import key


@dataclass(frozen=True)
class Growth:
    """What is larger after so many updates; what is 0, or empty, stays as it is."""

    step: int = key(0, "updates after which the denoiser grows", 1)
    layers: int = key(0, "a unet's layers_per_block, a dit's num_layers", 1, 128)
    widths: int | tuple[int, ...] = key(0, "a unet's block_out_channels, a dit's heads times their width", 1, 2**16)
    resolution: int = key(0, "data.resolution", 8, 4096)
    attention: tuple[int, ...] = key((), "the levels of a unet, from 0, that have cross-attention", 0, 15)

    @property
    def each(self) -> tuple[int, ...]:
        """The widths as a list, empty where they stay."""
        return self.widths if isinstance(self.widths, tuple) else (self.widths,) * bool(self.widths)

    @property
    def parts(self) -> list[str]:
        """The names of what grows."""
        return [name for name in ("layers", "widths", "resolution", "attention") if getattr(self, name)]


def times(new: int, old: int) -> int:
    """2, 4, 8, ... where `new` is so many times `old`, else 0: halves of weights are then exact."""
    ratio = new // old
    return ratio if ratio > 1 and new == ratio * old and ratio & (ratio - 1) == 0 else 0
