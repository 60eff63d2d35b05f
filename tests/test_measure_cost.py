"""What a call costs, against papers, closed forms, what a real run keeps for its backward pass, and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tinydiff import config
from tinydiff.cost import costs
from tinydiff.measure.cost import Cost, cost, reach
from tinydiff.models.attention import Attention
from tinydiff.models.autoencoder import Autoencoder
from tinydiff.models.bert import BertConfig, BertEncoder
from tinydiff.models.dit import Condition, DiT
from tinydiff.models.t5 import T5Config, T5Encoder
from tinydiff.models.text_encoder import TextEncoder
from tinydiff.models.unet import UNet
from tinydiff.networks.dit import DiT as DiTSettings

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def of(network: nn.Module, method: str = "forward", **inputs: Tensor) -> Cost:
    return cost(network.to("meta"), method, {name: x.to("meta") for name, x in inputs.items()})


def unet() -> tuple[nn.Module, dict[str, Tensor]]:
    cfg = config.UNet((8, 16, 24), (PLAIN, CROSS, PLAIN), 2, 2, 2, 4, False)
    inputs = {"sample": torch.randn(1, 4, 16, 8), "timestep": torch.ones(1)}
    return UNet(cfg, 4, 10), inputs | {"encoder_hidden_states": torch.randn(1, 7, 10)}


def dit(classes: int) -> tuple[nn.Module, dict[str, Tensor]]:
    net = DiT(DiTSettings("custom", 2, 3, 2, 12), 3, 8, classes=classes, context_dim=None if classes else 10)
    inputs = {"sample": torch.randn(2, 3, 8, 4), "timestep": torch.ones(2)}
    context = torch.full((2, 1, classes + 1), 0.1) if classes else torch.randn(2, 7, 10)
    return net, inputs | {"encoder_hidden_states": context}


def autoencoder(widths: tuple[int, ...] = (8, 16, 16), layers: int = 2, attention: bool = False) -> Autoencoder:
    return Autoencoder(config.Autoencoder(widths, layers, 3, 4, attention))


# ---- parameters and operations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "patch", "side", "millions", "gflops"),
    [
        ("XL", 2, 32, 675, 118.6),
        ("XL", 2, 64, 675, 524.6),
        ("L", 4, 32, 459, 19.7),
        ("B", 2, 32, 130, 23.0),
        ("S", 8, 32, 33, 0.36),
    ],
)
def test_dits_cost_what_the_paper_says(size: str, patch: int, side: int, millions: int, gflops: float) -> None:
    """Peebles & Xie 2023, tables 4 and 6, where a multiply-add is one operation. Its blocks embed time and class once."""
    with torch.device("meta"):
        net = DiT(DiTSettings(size, patch), 4, side, classes=1000, learned_sigma=True)
        inputs = {"sample": torch.empty(1, 4, side, side), "timestep": torch.empty(1)}
        found = cost(net, "forward", inputs | {"encoder_hidden_states": torch.empty(1, 1, 1001)})
    assert found.flops / 2e9 == pytest.approx(gflops, rel=0.01)
    assert found.parameters / 1e6 == pytest.approx(millions, rel=0.02)
    assert found.reach == math.inf


def test_a_linear_layer_and_a_convolution() -> None:
    found = of(nn.Linear(5, 7), input=torch.empty(3, 5))
    assert found == Cost(5 * 7 + 7, 2 * 3 * 5 * 7, 4 * 3 * 5, None)
    found = of(nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), input=torch.empty(1, 6, 8, 10))
    assert found == Cost(8 * 3 * 9 + 8, 2 * 8 * (4 * 5) * 3 * 9, 4 * 6 * 8 * 10, 3)


def test_attention_costs_four_matrices_and_two_products() -> None:
    t, s, width, context = 6, 5, 8, 10
    found = of(Attention(width, 2, context), x=torch.empty(1, t, width), context=torch.empty(1, s, context))
    products = 2 * (2 * t * s * width)
    assert found.flops == 2 * (2 * t * width**2) + 2 * (2 * s * context * width) + products
    q, k, v, sums, y = t * width, s * width, s * width, 2 * t, t * width
    assert found.activations == 4 * (t * width + s * context + q + k + v + sums + y)


def test_shared_parameters_are_counted_once() -> None:
    layer = nn.Linear(4, 4)
    found = of(nn.Sequential(layer, layer), input=torch.empty(1, 4))
    assert (found.parameters, found.flops) == (20, 64)


# ---- activations ---------------------------------------------------------------------------------------------------


def kept(call: Callable[[], Any], network: nn.Module) -> int:
    """Bytes of storage that a real call leaves for its backward pass."""
    tensors: list[Tensor] = []
    with saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
        output = call()
    own = {x.untyped_storage().data_ptr() for x in (*network.parameters(), *network.buffers())}
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert output is not None
    return sum(size for address, size in sizes.items() if address not in own)


def test_a_perceptron_keeps_its_input_and_what_relu_makes() -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    assert of(net, input=torch.empty(4, 5)).activations == 4 * 4 * (5 + 7)


def test_a_convolutional_network_keeps_both_sides_of_silu() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 5, 1))
    assert of(net, input=torch.empty(1, 3, 6, 6)).activations == 4 * 36 * (3 + 8 + 8)


def test_frozen_parameters_keep_nothing() -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).requires_grad_(False)
    assert of(net, input=torch.empty(4, 5)).activations == 0
    net[2].requires_grad_(True)
    assert of(net, input=torch.empty(4, 5)).activations == 4 * 4 * 7


@pytest.mark.parametrize("make", [unet, lambda: dit(11), lambda: dit(0)], ids=["unet", "dit by class", "dit by text"])
def test_denoisers_keep_what_a_real_run_keeps(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> None:
    net, inputs = make()
    wanted = kept(lambda: net(**inputs), net)
    assert wanted and of(net, **inputs).activations == wanted


@pytest.mark.parametrize("attention", [False, True])
def test_an_autoencoder_keeps_what_a_real_run_keeps(attention: bool) -> None:
    net, x, z = autoencoder(attention=attention), torch.randn(1, 3, 16, 24), torch.randn(1, 3, 4, 6)
    wanted = kept(lambda: net.encode(x), net), kept(lambda: net.decode(z), net)
    found = of(net, "encode", sample=x), of(net, "decode", latent_sample=z)
    assert (found[0].activations, found[1].activations) == wanted


@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_a_text_encoder_keeps_what_a_real_run_keeps_and_has_no_reach(kind: str) -> None:
    clip = TextEncoder(config.TextEncoder("clip", "", 600, 16, 40, 3, 2, 9), 600, 599)
    t5, bert = T5Encoder(T5Config(600, 24, 5, 40, 3, 4, 8, 20)), BertEncoder(BertConfig(600, 16, 3, 2, 40, 9))
    net = {"clip": clip, "t5": t5, "bert": bert}[kind]
    ids = torch.arange(1, 10)[None]
    wanted = kept(lambda: net(ids), net)
    found = of(net, input_ids=ids)
    assert (found.activations, found.reach) == (wanted, None)


# ---- reach ---------------------------------------------------------------------------------------------------------


def reach_of(call: Callable[..., Any], *shape: int) -> float | None:
    """Of a call of an image, four channels of 16 x 16 unless it is said."""
    return reach(lambda x: call(x), {"x": torch.empty(shape or (1, 4, 16, 16), device="meta")})


def stack(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).to("meta")


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def by_gradient(network: nn.Module, method: str, channels: int, rows: int, columns: int, outputs: int) -> int:
    """The rows from the first to the last whose gradient is not 0; the most over `outputs` rows in the middle.

    Norms are left out, and no weight is 0.
    """
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5).div_(parameter[0].numel())
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    x = torch.rand(1, channels, rows, columns, requires_grad=True)
    y = getattr(network, method)(x)
    middle, seen = (y.shape[2] - outputs) // 2, []
    for i in range(middle, middle + outputs):
        (grad,) = torch.autograd.grad(y[0, :, i, y.shape[3] // 2].sum(), x, retain_graph=True)
        touched = grad.abs().sum((0, 1, 3)).nonzero()
        assert touched.min() > 0 and touched.max() < rows - 1
        seen.append(int(touched.max() - touched.min()) + 1)
    return max(seen)


@pytest.mark.parametrize(("widths", "layers"), [((4,), 1), ((4, 4), 2), ((8, 4, 4), 1), ((4, 8, 4), 2)])
def test_an_autoencoder_reaches_as_far_as_its_gradient(widths: tuple[int, ...], layers: int) -> None:
    factor = 2 ** (len(widths) - 1)
    with double():
        net = autoencoder(widths, layers).requires_grad_(False).to("meta")
        down, up = reach_of(net.encode, 1, 3, 8, 8), reach_of(net.decode, 1, 3, 4, 4)
        assert by_gradient(net, "encode", 3, 192, 4 * factor, 3) == down
        assert by_gradient(net, "decode", 3, 48, 4, 2 * factor) == up


class Branches(nn.Module):
    """Strides, dilation, groups, a skip, a shift, both ways up and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 4, stride=2, padding=1, groups=2)
        self.wide = nn.Conv2d(8, 8, 3, padding=4, dilation=4)
        self.up = nn.Conv2d(8, 4, 3, padding=1)
        self.out = nn.Conv2d(12, 4, (5, 1), padding=(2, 0))

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = torch.cat([F.interpolate(a + self.wide(a), scale_factor=2.0), F.pad(x, (0, 0, 3, -3), mode="constant")], 1)
        left, gate = self.up(b[:, :8]).flatten(2).transpose(1, 2).chunk(2, dim=-1)
        y = (left * gate.sigmoid()).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.out(torch.cat([y, b[:, 4:], F.pixel_shuffle(self.down(x - 1), 2)], 1))


def test_branches_reach_as_far_as_their_gradient() -> None:
    with double():
        net = Branches().requires_grad_(False).to("meta")
        assert reach_of(net) == by_gradient(net, "forward", 4, 96, 8, 4) > 20


def test_a_second_image_of_another_size_grows_with_the_first() -> None:
    """And is no part of what the first is seen through, however far it is seen itself."""
    net, far = stack(nn.Conv2d(4, 4, 5, padding=2)), stack(nn.Conv2d(3, 4, 9, padding=4, stride=4))
    images = {"x": torch.empty(1, 4, 8, 8, device="meta"), "y": torch.empty(1, 3, 32, 32, device="meta")}
    assert reach(lambda x, y: net(x) + far(y), images) == 5


LAYERS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 4)), max_size=4)


@settings(deadline=None, max_examples=40)
@given(LAYERS)
def test_convolutions_reach_what_the_textbook_says(layers: list[tuple[int, int, int, int]]) -> None:
    """1 + sum of dilation (kernel - 1) times the strides before (Araujo et al. 2019, equation 2)."""
    wanted, jump, convolutions = 1, 1, []
    for kernel, stride, padding, dilation in layers:
        convolutions.append(nn.Conv2d(4, 4, kernel, stride, padding, dilation))
        wanted, jump = wanted + dilation * (kernel - 1) * jump, jump * stride
    assert reach_of(stack(*convolutions), 1, 4, 256, 512) == wanted


@pytest.mark.parametrize(("kernel", "wanted"), [(1, 1), (3, 2), (5, 3), (7, 4)])
def test_a_convolution_above_a_doubling_reaches_half_as_far(kernel: int, wanted: int) -> None:
    net = stack(nn.Upsample(scale_factor=2.0), nn.Conv2d(4, 4, kernel, padding=kernel // 2))
    assert reach_of(net) == wanted


class Reader(nn.Module):
    """A convolution, then attention to the image or to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention = nn.Conv2d(4, 8, 5, padding=2), Attention(8, 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.attention(self.conv(x).flatten(2).transpose(1, 2), context)


def test_attention_reaches_everything_unless_its_keys_do_not_depend_on_the_image() -> None:
    x, context = torch.empty(1, 4, 8, 8), torch.empty(1, 7, 8)
    assert of(Reader(), x=x).reach == math.inf
    assert of(Reader(), x=x, context=context).reach == 5
    net, inputs = unet()
    assert of(net, **inputs).reach == math.inf
    assert reach_of(autoencoder(attention=True).to("meta").encode, 1, 3, 16, 16) == math.inf


def test_what_norms_measure_is_no_path_and_what_ignores_the_image_has_no_reach() -> None:
    assert reach_of(stack(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.SiLU())) == 3
    assert reach_of(lambda x: x) == 1
    assert reach_of(lambda x: x.mean(1, keepdim=True) + x.amax(1, keepdim=True)) == 1
    assert reach_of(lambda x: x * x.mean((2, 3), keepdim=True)) == math.inf
    assert reach_of(lambda x: torch.empty(3, device="meta")) == 0


UNKNOWN = {
    "a sum so far": lambda x: x.cumsum(2),
    "a softmax": lambda x: x.softmax(2),
    "in place": lambda x: x.clone().add_(1),
    "another interpolation": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "a transposed convolution": lambda x: F.conv_transpose2d(x, torch.empty(4, 4, 3, 3, device="meta")),
    "a product with itself": lambda x: x @ x.transpose(2, 3),
    "strides by hand": lambda x: x.as_strided((4, 4), (1, 2)),
    "a row that all depend on": lambda x: x + x[:, :, :1],
    "pooling": lambda x: F.avg_pool2d(x, 2),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_operation_that_is_not_known_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match="the reach of"):
        reach_of(UNKNOWN[name])


# ---- whole models, by their configurations ---------------------------------------------------------------------------

SD = (320, 640, 1280, 1280), (CROSS,) * 3 + (PLAIN,), 2, 1
UNETS = {
    "one level": (config.UNet((8,), (CROSS,), 1, 1, 2, 4, True), 3, 5),
    "no text above": (config.UNet((8, 16, 24), (PLAIN, CROSS, PLAIN), 1, 2, 2, 4, False), 4, 7),
    "three layers": (config.UNet((8, 8, 16), (CROSS, PLAIN, CROSS), 3, 1, 2, 4, True), 4, 6),
}
T5 = {"model_type": "t5"}


def counted(call: Callable[[], Any]) -> int:
    """What torch counts in a call on the meta device, where it writes attention out as two products."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count_unet(cfg: config.UNet, channels: int, extra: int, context: int, h: int, w: int, tokens: int) -> int:
    with torch.device("meta"):
        net = UNet(cfg, channels, context, extra)
    return counted(lambda: net(torch.empty(1, channels + extra, h, w), torch.empty(1), torch.empty(1, tokens, context)))


def unet_table(cfg: config.UNet, channels: int, extra: int, context: int) -> dict[str, Any]:
    return asdict(cfg) | {"in_channels": channels + extra, "out_channels": channels, "cross_attention_dim": context}


def flops(configs: dict[str, Any], h: int, w: int, tokens: int, factor: int = 1) -> dict[str, int]:
    return {name: found["flops"] for name, found in costs(configs, h, w, tokens, factor).items()}


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_costs_what_torch_counts(name: str, extra: int) -> None:
    cfg, channels, context = UNETS[name]
    for h, w, tokens in ((8, 8, 7), (4, 12, 1)):
        wanted = count_unet(cfg, channels, extra, context, h, w, tokens)
        assert flops({"unet": unet_table(cfg, channels, extra, context)}, h, w, tokens) == {"unet": wanted}


@pytest.mark.parametrize(
    ("context", "heads", "linear", "side", "forms"),
    [
        (768, 8, False, 64, (803_273_441_280, 2_514_518_933_504, 13_298_503_680)),
        (1024, (5, 10, 20, 20), True, 96, (2_149_105_745_920, 5_754_304_364_544, 23_544_643_584)),
    ],
    ids=["1.5", "2.1"],
)
def test_stable_diffusion_costs_what_torch_counts(
    context: int, heads: Any, linear: bool, side: int, forms: tuple[int, int, int]
) -> None:
    """`forms` are from closed forms of each layer, added up."""
    cfg = config.UNet(*SD, heads, 32, linear)
    tower = config.TextEncoder("clip", "", 49408, context, 4 * context, 12, 8, 77)
    autoencoder = config.Autoencoder((128, 256, 512, 512), 2, 4, 32, True)
    with torch.device("meta"):
        vae, text = Autoencoder(autoencoder), TextEncoder(tower, 49408, 49407)
    tables = {"unet": unet_table(cfg, 4, 0, context), "vae": asdict(autoencoder), "text_encoder": asdict(tower)}
    found = flops(tables, side, side, 77, factor=8)
    assert found == {
        "text_encoder": counted(lambda: text(torch.empty(1, 77, dtype=torch.int64))),
        "unet": count_unet(cfg, 4, 0, context, side, side, 77),
        "vae_encoder": counted(lambda: vae.encode(torch.empty(1, 3, 8 * side, 8 * side))),
        "vae_decoder": counted(lambda: vae.decode(torch.empty(1, 4, side, side))),
    }
    assert (found["unet"], found["vae_decoder"], found["text_encoder"]) == forms


def dit_table(cfg: DiTSettings, channels: int, **more: Any) -> dict[str, Any]:
    layers, heads, head = cfg.shape
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head}
    return sizes | {"patch_size": cfg.patch_size, "in_channels": channels} | more


def count_dit(net: DiT, h: int, w: int, *condition: int) -> int:
    return counted(lambda: net(torch.empty(1, net.channels, h, w), torch.empty(1), torch.empty(1, *condition)))


@pytest.mark.parametrize("patch", [2, 4])
def test_a_dit_costs_what_torch_counts(patch: int) -> None:
    cfg = DiTSettings("custom", patch, 3, 2, 12)
    with torch.device("meta"):
        by_class = DiT(cfg, 3, 8, classes=11, learned_sigma=True)
        by_text = DiT(cfg, 4, 8, context_dim=10)
    labelled = dit_table(cfg, 3, num_embeds_ada_norm=11, out_channels=6)
    written = dit_table(cfg, 4, num_embeds_ada_norm=1, cross_attention_dim=10)
    for h, w in ((8, 8), (4, 16)):
        assert flops({"transformer": labelled}, h, w, 1) == {"transformer": count_dit(by_class, h, w, 1, 12)}
        assert flops({"transformer": written}, h, w, 7) == {"transformer": count_dit(by_text, h, w, 7, 10)}


def test_blocks_that_embed_time_and_class_each_for_itself_cost_that_more() -> None:
    cfg = DiTSettings("custom", 2, 3, 2, 12)
    with torch.device("meta"):
        net, embedding = DiT(cfg, 3, 8, classes=11, shared=False), Condition(24, 11)
    again = counted(lambda: embedding(torch.empty(1, 256), torch.empty(1, 1, 12)))
    shared = flops({"transformer": dit_table(cfg, 3, num_embeds_ada_norm=11)}, 8, 8, 1)["transformer"]
    assert again and count_dit(net, 8, 8, 1, 12) - shared in (2 * again, 3 * again)  # the output layer may embed anew


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("widths", [(8,), (8, 16, 8)])
def test_an_autoencoder_costs_what_torch_counts(widths: tuple[int, ...], attention: bool) -> None:
    cfg, factor = config.Autoencoder(widths, 2, 3, 4, attention), 2 ** (len(widths) - 1)
    with torch.device("meta"):
        net = Autoencoder(cfg)
    tables = {"transformer": dit_table(DiTSettings("custom", 2, 1, 1, 8), 4), "vae": asdict(cfg)}
    found = flops(tables, 6, 10, 1, factor)
    assert list(found) == ["transformer", "vae_encoder", "vae_decoder"]
    assert found["vae_encoder"] == counted(lambda: net.encode(torch.empty(1, 3, 6 * factor, 10 * factor)))
    assert found["vae_decoder"] == counted(lambda: net.decode(torch.empty(1, 3, 6, 10)))


def test_a_text_encoder_costs_what_torch_counts() -> None:
    cfg = config.TextEncoder("clip", "", 600, 16, 40, 3, 2, 9)
    with torch.device("meta"):
        net = TextEncoder(cfg, 600, 599)
    unet = unet_table(UNETS["one level"][0], 4, 0, 16)
    found = flops({"unet": unet, "text_encoder": asdict(cfg)}, 8, 8, 9)
    assert found["text_encoder"] == counted(lambda: net(torch.empty(1, 9, dtype=torch.int64)))


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_a_t5_encoder_costs_what_torch_counts(kind: str) -> None:
    cfg = T5Config(99, 24, 5, 40, 3, 4, 8, 20, feed_forward_proj=kind)
    with torch.device("meta"):
        net = T5Encoder(cfg)
    dit = dit_table(DiTSettings("custom", 2, 1, 1, 8), 4, cross_attention_dim=24)
    found = {"text_encoder": asdict(cfg) | T5, "transformer": dit}
    assert flops(found, 8, 8, 13)["text_encoder"] == counted(lambda: net(torch.empty(1, 13, dtype=torch.int64)))


def test_a_model_costs_what_its_networks_do() -> None:
    unet_cfg, tower, vae = UNETS["no text above"][0], T5Config(99, 24), config.Autoencoder((8, 16), 1, 3, 4, False)
    tables = {"unet": unet_table(unet_cfg, 4, 0, 24), "text_encoder": asdict(tower) | T5, "vae": asdict(vae)}
    found = costs(tables, 8, 4, 5, factor=2)
    told = {
        "sample": torch.empty(1, 4, 8, 4),
        "timestep": torch.empty(()),
        "encoder_hidden_states": torch.empty(1, 5, 24),
    }
    assert found == {
        "text_encoder": vars(of(T5Encoder(tower), input_ids=torch.empty(1, 5, dtype=torch.int64))),
        "unet": vars(of(UNet(unet_cfg, 4, 24), **told)) | {"reach": "all"},
        "vae_encoder": vars(of(Autoencoder(vae), "encode", sample=torch.empty(1, 3, 16, 8))),
        "vae_decoder": vars(of(Autoencoder(vae), "decode", latent_sample=torch.empty(1, 3, 8, 4))),
    }
    assert found["text_encoder"]["reach"] is None
    assert type(found["vae_encoder"]["reach"]) is type(found["vae_decoder"]["reach"]) is int


def test_an_older_configuration_costs_what_it_means_when_opened() -> None:
    """A config.json without a key costs what the same with that key as its makers' library takes it does."""
    unknown = {"attention_head_dim": None, "cross_attention_dim": 768}  # null is no key
    sd = unet_table(config.UNet(*SD, 8, 32, False), 4, 0, 768)
    assert costs({"unet": unknown}, 8, 8, 77) == costs({"unet": sd}, 8, 8, 77)
    xl = dit_table(DiTSettings("XL"), 4, num_embeds_ada_norm=1000)
    assert flops({"transformer": {}}, 8, 8, 1) == flops({"transformer": xl}, 8, 8, 1)
    dit = {"transformer": dit_table(DiTSettings("custom", 2, 1, 1, 8), 4)}
    vae = {"block_out_channels": (32, 64)}
    whole = vae | {"layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32, "mid_block_add_attention": True}
    assert costs(dit | {"vae": vae}, 8, 8, 1) == costs(dit | {"vae": whole}, 8, 8, 1)
    older = costs(dit | {"text_encoder": T5}, 8, 8, 13)
    assert older["text_encoder"]["flops"] == 492_810_240  # from a closed form: 6 blocks of 512, 8 heads, relu
    assert older == costs(dit | {"text_encoder": T5 | asdict(T5Config())}, 8, 8, 13)
    clip = {"vocab_size": 600, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    found = flops(dit | {"text_encoder": clip | {"num_attention_heads": 2}}, 8, 8, 9)["text_encoder"]
    assert found == 2 * (4 * (2 * 9 * 16 * 16) + 2 * (2 * 9 * 9 * 16) + 2 * (2 * 9 * 16 * 32))


def test_what_a_model_lacks_costs_nothing_and_what_a_configuration_lacks_is_told() -> None:
    dit = dit_table(DiTSettings("custom", 2, 1, 1, 8), 4)
    found = costs({"transformer": dit}, 8, 8, 1)
    assert list(found) == ["transformer"] and found["transformer"]["flops"]
    with pytest.raises(KeyError, match="cross_attention_dim"):
        costs({"unet": {}}, 8, 8, 77)
    with pytest.raises(KeyError, match="block_out_channels"):
        costs({"transformer": dit, "vae": {}}, 8, 8, 1)
    with pytest.raises(KeyError, match="vocab_size"):
        costs({"transformer": dit, "text_encoder": {"model_type": "clip_text_model"}}, 8, 8, 1)
