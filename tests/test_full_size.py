"""Networks of Stable Diffusion's and DiT-XL/2's own size against diffusers: minutes and gigabytes, so only when asked for."""

from __future__ import annotations

import pytest

from scripts import parity

pytestmark = [pytest.mark.slow, pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("kind", parity.KINDS)
def test_full_size(kind, tmp_path):
    parity.build(kind, tmp_path / kind)
    for name, value in parity.networks(kind, tmp_path / kind):
        assert value <= 1e-4, name
    for name, share in parity.images(kind, tmp_path / kind) if kind != "dit-xl" else ():
        assert share >= 0.999, name
