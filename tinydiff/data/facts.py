"""What the images and captions of a source are, counted before anything is trained: for choices, warnings and a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from tinydiff.data.dataset import Source, buckets, examples, nearest
from tinydiff.text.tokenizer import CLIP_LENGTH, Tokenizer

MOST = 20_000  # images looked at, spread over the source


@dataclass(frozen=True, eq=False)
class Facts:
    """Of `count` images: `sizes` (N, 2), width and height, and `captions`, of those looked at; what a person is told of them."""

    count: int
    sizes: np.ndarray
    captions: list[list[str]]
    report: str
    examples: list[str]

    @classmethod
    def of(cls, source: Source) -> Facts:
        looked = np.unique(np.linspace(0, len(source) - 1, min(MOST, len(source))).astype(int)).tolist()
        sizes = np.array([source.size(i) for i in looked]).reshape(-1, 2)
        return cls(len(source), sizes, [source.captions(i) for i in looked], source.report(), examples(source))

    def first(self, count: int) -> Facts:
        """The same with no more than so many captions of an image; 0 is all."""
        return replace(self, captions=[each[: count or None] for each in self.captions])

    @property
    def texts(self) -> Iterator[str]:
        return (text for captions in self.captions for text in captions)

    @cached_property
    def distinct(self) -> Counter[str]:
        """How many of the images that were looked at have a caption."""
        return Counter(text for captions in self.captions for text in dict.fromkeys(captions))

    @cached_property
    def words(self) -> int:
        """Words that captions say more than once."""
        return sum(n > 1 for n in Counter(word for text in self.texts for word in text.lower().split()).values())

    @property
    def each(self) -> float:
        """Captions an image."""
        return sum(map(len, self.captions)) / len(self.captions)

    @lru_cache(2)  # noqa: B019
    def lengths(self, vocabulary: int) -> list[int]:
        """Tokens of the captions, start and end included, shortest first, by a vocabulary of so many made of them."""
        tokenizer = Tokenizer.train(self.texts, vocabulary, CLIP_LENGTH)
        return sorted(len(tokenizer.ids(text)) + 2 for text in self.distinct)

    @property
    def side(self) -> int:
        """Pixels of the shorter side that half of the images have at least."""
        return int(np.median(self.sizes.min(1)))

    def smaller(self, resolution: int) -> float:
        """The share of images whose shorter side is below this."""
        return float((self.sizes.min(1) < resolution).mean())

    def cropped(self, resolution: int, ratio: float = 1.0, step: int = 16, most: float = 0.25) -> float:
        """The share of images of which more than `most` of the area is cut off where they are fitted to their bucket."""
        sizes, (width, height) = buckets(resolution, ratio, step), self.sizes.T.astype(float)
        fitted = np.array(sizes, float)[nearest(sizes, width, height)]
        shape, wanted = width / height, fitted[:, 0] / fitted[:, 1]
        return float((np.minimum(shape / wanted, wanted / shape) < 1 - most).mean())
