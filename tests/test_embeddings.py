"""The cache of text embeddings: each caption's own, read back, and never another encoder's."""

from __future__ import annotations

import pytest
import torch

from tinydiff.backends.pytorch import TorchBackend
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.data import cache, embeddings
from tinydiff.errors import DataError

CAPTIONS = sorted({"", "zebra", "ünïcode", *(f"caption {i}" for i in range(40))})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cache, "ROWS", 16)
    monkeypatch.setattr(cache, "BATCH", 8)


class Encoder:
    """Vectors that tell the caption, and a count of captions encoded."""

    def __init__(self):
        self.count = 0

    def __call__(self, captions):
        self.count += len(captions)
        return {"vectors": torch.stack([self.alone(caption) for caption in captions]).numpy()}

    @staticmethod
    def alone(caption):
        generator = torch.Generator().manual_seed(sum(i * b for i, b in enumerate(caption.encode(), 7)))
        return torch.randn(5, 3, generator=generator)


def quiet(done, total):
    pass


def fill(folder, encoder, captions=CAPTIONS, digest="a", progress=quiet, rank=0, world=1):
    embeddings.fill(folder, captions, encoder, digest, progress, rank, world)


def test_rows_are_each_caption_s_own(tmp_path):
    encoder = Encoder()
    fill(tmp_path, encoder)
    found = embeddings.open_cache(tmp_path, CAPTIONS, "a")
    asked = ["zebra", "", "caption 7", "zebra", *CAPTIONS[::-1]]
    (rows,) = found.rows(asked).values()
    assert rows.shape == (len(asked), 5, 3) and rows.dtype == torch.float32
    assert torch.equal(rows, torch.stack([encoder.alone(caption) for caption in asked]))
    assert len(found.paths) == 3 and all(path.is_file() for path in found.paths)
    for unknown in ("caption 400", "zzz"):
        with pytest.raises(KeyError, match=unknown):
            found.rows(["zebra", unknown])


def test_half_precision_is_widened(tiny_model, tmp_path):
    """By the backend, whose condition is what is cached."""
    backend = TorchBackend(folder.load(Source(tiny_model)))
    encoder, tokenizer = backend.model.networks["text_encoder"].bfloat16(), backend.tokenizers["text_encoder"]
    fill(tmp_path, lambda captions: backend.encode_text({"text_encoder": tokenizer.encode(captions)}))
    (rows,) = embeddings.open_cache(tmp_path, CAPTIONS, "a").rows(["zebra"]).values()
    with torch.inference_mode():
        wanted = encoder(torch.from_numpy(tokenizer.encode(["zebra"])))[0]
    assert wanted.dtype == torch.bfloat16 and rows.dtype == torch.float32
    torch.testing.assert_close(rows, wanted.float(), rtol=0.02, atol=0.02)
    assert torch.equal(rows, rows.bfloat16().float())


def test_every_input_has_its_own_files(tmp_path):
    encoder = Encoder()

    def encoded(**changes):
        before = encoder.count
        fill(tmp_path, encoder, **changes)
        return encoder.count - before

    assert (encoded(), encoded()) == (43, 0)
    assert encoded(digest="b") == 43
    assert encoded(captions=[*CAPTIONS[:-1], "ÿ"]) == 11  # the last chunk


def test_a_missing_file_is_an_error(tmp_path):
    fill(tmp_path, Encoder())
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(DataError, match="missing or damaged"):
        embeddings.open_cache(tmp_path, CAPTIONS, "a")


def test_processes_share_the_work(tmp_path):
    encoders, seen = [Encoder() for _ in range(4)], []
    fill(tmp_path / "one", encoders[3], progress=lambda *both: seen.append(both))
    assert [done for done, _ in seen] == [8, 16, 24, 32, 40, 43] and seen[-1] == (43, 43)
    for rank in range(3):
        fill(tmp_path / "three", encoders[rank], rank=rank, world=3)
    assert [encoder.count for encoder in encoders] == [16, 16, 11, 43]
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "three"))
    assert one == three


def test_every_array_has_its_own_rows(tmp_path):
    def encode(captions):
        (vectors,) = Encoder()(captions).values()
        return {"one": vectors, "other": 2 * vectors[:, 0]}

    fill(tmp_path, encode)
    rows = embeddings.open_cache(tmp_path, CAPTIONS, "a").rows(["zebra", ""])
    assert torch.equal(rows["one"][0], Encoder.alone("zebra")) and rows["other"].shape == (2, 3)
    assert torch.equal(rows["other"][1], 2 * Encoder.alone("")[0])
