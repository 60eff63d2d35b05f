"""A new word for what a few images show (textual inversion: Gal et al. 2022): its vectors alone learn and are saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinydiff.adapters import words
from tinydiff.adapters.words import Word
from tinydiff.condition import Condition
from tinydiff.errors import UsageError
from tinydiff.files import committed
from tinydiff.networks import network_of
from tinydiff.schema import brief, to_toml
from tinydiff.stages import WordStage
from tinydiff.training.denoiser import DenoiserTask
from tinydiff.training.run import Run
from tinydiff.training.state import Blocks
from tinydiff.training.task import PICTURES


class Taught(nn.Module):
    """A table of vectors (V, D) that stays as it is, and `rows` (N, D) of the ids after its own, which learn."""

    def __init__(self, table: nn.Embedding, rows: Tensor):
        super().__init__()
        self.table, self.rows = table, nn.Parameter(rows)

    def forward(self, ids: Tensor) -> Tensor:
        new = ids - self.table.num_embeddings  # (B, T), below 0 for the table's own
        return torch.where(
            new[..., None] < 0, self.table(ids.clamp(max=self.table.num_embeddings - 1)), self.rows[new.clamp(min=0)]
        )


class WordTask(DenoiserTask):
    name, publishes = "word", "adapter"

    @classmethod
    def check(cls, settings: WordStage) -> None:
        if not 0 < len(settings.word.encode()) <= words.LONGEST or any(
            c.isspace() or c == "/" or not c.isprintable() for c in settings.word
        ):
            raise UsageError(f"train.word.word: {brief(settings.word)} is not one word; set one such as <cat>")
        if "{}" not in settings.prompt:
            raise UsageError(f"train.word.prompt: {brief(settings.prompt)} has no {{}}, where the word goes")

    def __init__(self, run: Run):
        settings: WordStage = run.cfg.train.stage(self.name)
        self.tables, tokenizers = dict[str, str](), dict[str, Any]()
        for name, encoder in run.model.text_encoders.items():
            self.tables[name] = getattr(network_of(name, run.model.configs[name]), "vectors", "").removesuffix(
                ".weight"
            )
            if not self.tables[name]:
                raise UsageError(f"train.adapter: words can be added to CLIP's, and {name} is another text encoder")
            table: Any = encoder.get_submodule(self.tables[name])
            ids = run.model.tokenizers[name].ids(settings.initial) or range(table.num_embeddings)
            rows = table.weight.detach()[list(ids)].mean(0).repeat(settings.vectors, 1)
            encoder.set_submodule(self.tables[name], run.runtime.placed(Taught(table, rows)))
            try:
                tokens = Word(settings.word, {name: rows.cpu().numpy()}).tokens
                tokenizers[name] = run.model.tokenizers[name].taught({settings.word: tokens}, table.num_embeddings)
            except ValueError as error:
                raise UsageError(f"train.word.word: {brief(str(error))} is a word of the model already") from None
        if not tokenizers:
            raise UsageError("train.adapter: a model of classes reads no words")
        run.model = replace(run.model, tokenizers=tokenizers)
        self.caption = settings.caption
        super().__init__(run)
        self.captions = [self.caption] * PICTURES  # type: ignore[misc]

    def told(self, captions: Sequence[str]) -> tuple[dict[str, Tensor], Condition]:
        """Of every image the same caption, which has the word; none where it is dropped."""
        return super().told([caption and self.caption for caption in captions])

    def publish(self, checkpoint: Path, path: Path) -> None:
        """A folder with one file of the averaged vectors, named after the word, and the configuration of the run."""
        kept = dict(Blocks(checkpoint, "average").whole())
        vectors = {name: kept[f"{self.name}.{name}.{table}.rows"].numpy() for name, table in self.tables.items()}
        with committed(path, replace=True) as folder:
            word = Word(self.settings.word, vectors)
            words.write(folder / f"{word.text}.safetensors", word, self.settings.style, base=self.run.origin)
            (folder / "tinydiff.toml").write_text(to_toml(self.cfg), encoding="utf-8")
