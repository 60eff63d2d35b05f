"""A backend whose answers are known without a network, and a request to make of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tinydiff.checkpoints import scheduler
from tinydiff.checkpoints.description import Description
from tinydiff.config import Generate
from tinydiff.networks.network import HIDDEN, Array
from tinydiff.pipeline import Request

REQUEST = Request(steps=4, cfg_scale=3.0, sampler="dpmpp_2m", spacing="trailing", width=8, height=8)


SCHEDULER = scheduler.read({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"})


class Words:
    """A tokenizer whose ids are the lengths of the texts; with syntax, the lengths of the words."""

    max_length, bos, eos, pad = 5, 0, 0, 0

    def encode(self, texts):
        return np.array([[len(text)] * 5 for text in texts], np.int64)

    def cut(self, text):
        return " ".join(text.split()[3:])

    def spans(self, text):
        words = list(re.finditer(r"\S+", text))
        return [len(word[0]) for word in words], [word.start() for word in words]


CONDITIONS = {"encoder_hidden_states": Array(("batch", "sequence", 2), of=HIDDEN)}


class Fake:
    """A backend that has learnt one flat image for each text: a hundredth of its length, and says what it was asked."""

    name, tokenizers, at_once = "fake", {"text_encoder": Words()}, 1

    def __init__(self, scaling_factor=0.5):
        self.description = Description(Path("fake"), SCHEDULER, 3, 3, 2, 4, scaling_factor, 8, Generate(), CONDITIONS)
        self.texts, self.calls = [], []

    def encode_text(self, ids):
        (ids,) = ids.values()
        self.texts.append(ids[:, 0].tolist())
        return {"encoder_hidden_states": np.repeat(ids[:, :, None], 2, axis=2).astype(np.float32) / 100}

    def denoise(self, x, t, condition):
        (context,) = condition.values()
        assert len(x) == len(context) and x.dtype == np.float32 and type(t) is float
        self.calls.append((len(x), t))
        return np.broadcast_to(context[:, :1, :1, None], x.shape).astype(np.float32)

    def decode(self, z):
        return z.repeat(2, axis=2).repeat(2, axis=3)
