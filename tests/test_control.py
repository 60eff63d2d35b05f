"""Control networks against diffusers: the network, pictures, files; graphs, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import noise, randomise, same

from tinydiff.models.unet import UNet
from tinydiff.networks import CONTROL, DENOISERS
from tinydiff.networks.network import pick
from tinydiff.networks.unet import UNet as Settings
from tinydiff.networks.unet import residuals

SIZES: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (32, 64), "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 32},
    "sd2": {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "attention_head_dim": (1, 1, 2)}
    | {"cross_attention_dim": 48, "use_linear_projection": True},
}


def of_diffusers(kind: str) -> tuple[Any, Any]:
    """A U-Net and a control network with random weights."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    levels = len(SIZES[kind]["block_out_channels"])
    down = ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1)
    unet = UNet2DConditionModel(sample_size=16, down_block_types=down, up_block_types=up, **SIZES[kind])
    control = ControlNetModel.from_unet(unet)
    for seed, network in enumerate((unet, control)):
        randomise(network, seed)
        network.eval()
    return unet, control


@pytest.mark.parametrize("kind", SIZES)
@torch.inference_mode()
@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_network_and_what_a_unet_adds_of_it_are_those_of_diffusers(kind):
    theirs, their_control = of_diffusers(kind)
    unet, control = DENOISERS["unet"].build(dict(theirs.config)), CONTROL.build(dict(their_control.config))
    unet.load_state_dict(theirs.state_dict())
    control.load_state_dict(their_control.state_dict())
    x, context, image = noise(2, 4, 16, 24), noise(2, 7, SIZES[kind]["cross_attention_dim"]), noise(2, 3, 128, 192)
    t = torch.tensor(601.0)
    down, middle = their_control(x, t, context, image, return_dict=False)
    given = control(x, t, context, image)
    for ours, wanted in zip(given, (*down, middle), strict=True):
        same(ours, wanted)
    named = residuals(pick(Settings, DENOISERS["unet"].read(dict(theirs.config))))
    sizes = {"batch": 2, "height": 16, "width": 24}
    assert [array.shape(sizes) for array in named.values()] == [tuple(each.shape) for each in given]
    added = theirs(x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    same(unet(x, t, context, **dict(zip(named, given, strict=True))), added)
    assert not torch.allclose(added, theirs(x, t, context).sample, rtol=0.1)


@torch.inference_mode()
def test_a_new_one_begins_as_its_unet_and_as_no_change():
    settings = Settings((8, 16), ("CrossAttnDownBlock2D",) * 2, 1, 1, 2, 8, True)
    unet = UNet(settings, 4, 16, extra=5)
    randomise(unet)
    table = vars(settings) | {"in_channels": 9, "out_channels": 4, "cross_attention_dim": 16, "sample_size": 8}
    made = CONTROL.of_base(table, factor=4)
    control = CONTROL.build(made).begin_as(unet)  # type: ignore[operator]
    own, theirs = control.state_dict(), unet.state_dict()
    assert torch.equal(own["mid_block.resnets.1.conv2.weight"], theirs["mid_block.resnets.1.conv2.weight"])
    assert torch.equal(own["conv_in.weight"], theirs["conv_in.weight"][:, :4])
    given = control(noise(1, 4, 8, 8), torch.tensor(3.0), noise(1, 5, 16), noise(1, 3, 32, 32))
    assert all(not each.any() for each in given)
