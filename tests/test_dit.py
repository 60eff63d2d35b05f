"""The diffusion transformer against diffusers, against the published architecture, and what those do not check."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from published_dit import CLASSES, published_weights, reference
from tensors import noise, randomise
from torch.nn import functional as F

from tinydiff import config, export
from tinydiff.checkpoints import dit
from tinydiff.checkpoints.dit import NAMES, is_published, published
from tinydiff.errors import ModelError
from tinydiff.models.dit import DiT, DiTBlock
from tinydiff.models.spatial import positions, rates
from tinydiff.networks import DENOISERS
from tinydiff.networks.dit import SIZES, DiTNetwork, is_shared
from tinydiff.networks.dit import DiT as DiTSettings
from tinydiff.schema import build

TINY = DiTSettings("custom", 2, num_layers=3, num_attention_heads=2, attention_head_dim=12)


TEXT = 10


def one_hot(*labels: int, classes: int = CLASSES) -> torch.Tensor:
    return F.one_hot(torch.tensor(labels), classes + 1).float()[:, None]


def same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 5e-6) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 1e-2
    assert (ours - theirs).abs().max() <= tolerance * theirs.std()


def make(cfg: DiTSettings = TINY, **options) -> DiT:
    """Random weights in place of the zeros that networks start with."""
    if "context_dim" not in options:
        options = {"classes": CLASSES} | options
    net = DiT(cfg, **({"channels": 4, "side": 8} | options)).eval()
    randomise(net)
    return net


# ---- against diffusers -------------------------------------------------------------------------------------------------


def their_sizes(cfg: DiTSettings, side: int) -> dict:
    layers, heads, width = cfg.shape
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width, "sample_size": side}
    return sizes | {"patch_size": cfg.patch_size, "in_channels": 4, "norm_type": "ada_norm_zero"}


def their_dit(cfg: DiTSettings, side: int = 8, **options):
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel(**their_sizes(cfg, side), num_embeds_ada_norm=CLASSES, **options).eval()
    randomise(theirs)
    return theirs


def their_tokens(theirs, *args, **options) -> torch.Tensor:
    """What diffusers' last layer says of each token: it puts tokens together as if images were square."""
    caught = []
    hook = theirs.proj_out_2.register_forward_hook(lambda module, inputs, output: caught.append(output))
    theirs(*args, **options)
    hook.remove()
    return caught[0]


def our_tokens(x: torch.Tensor, patch: int) -> torch.Tensor:
    """An image (B, C, h, w) as the tokens it was put together from, each row by row, channels last."""
    x = x.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # (B, C, h/p, p, w/p, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("patch", [2, 4])
@torch.no_grad()
def test_dit_is_that_of_diffusers(patch):
    cfg = DiTSettings("custom", patch, 3, 4, 24)
    theirs = their_dit(cfg, 16)
    ours = DiT(cfg, 4, 16, CLASSES, shared=False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for t in (torch.tensor([0.0, 999.0]), torch.tensor([37.0, 500.5])):
        labels = torch.tensor([3, CLASSES])
        wanted = theirs(noise(2, 4, 16, 16), t, labels).sample
        same(ours(noise(2, 4, 16, 16), t, one_hot(3, CLASSES)), wanted)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(8, 8), (12, 12), (4, 16), (16, 4)])
@torch.no_grad()
def test_other_sizes_are_those_of_diffusers(size):
    theirs, t = their_dit(TINY), torch.tensor([600.0])
    ours = DiT(TINY, 4, 8, CLASSES, shared=False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = noise(1, 4, *size)
    same(our_tokens(ours(x, t, one_hot(1)), 2), their_tokens(theirs, x, t, torch.tensor([1])))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_what_we_train_opens_in_diffusers():
    ours, theirs = make(), their_dit(TINY)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    t = torch.tensor([10.0, 990.0])
    wanted = theirs(noise(2, 4, 8, 8), t, torch.tensor([0, 4])).sample
    same(ours(noise(2, 4, 8, 8), t, one_hot(0, 4)), wanted)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_learned_sigma_is_left_out():
    ours, theirs = make(learned_sigma=True), their_dit(TINY, out_channels=8)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    wanted = theirs(noise(1, 4, 8, 8), torch.tensor([10.0]), torch.tensor([2])).sample
    same(ours(noise(1, 4, 8, 8), torch.tensor(10.0), one_hot(2)), wanted[:, :4])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_text_is_attended_to_as_in_diffusers():
    from diffusers import Transformer2DModel

    ours = make(context_dim=TEXT)
    kinds = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
    theirs = Transformer2DModel(**their_sizes(TINY, 8), **kinds, num_embeds_ada_norm=1, cross_attention_dim=TEXT).eval()
    table = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    zeros = {table.format(i): torch.zeros(2, 24) for i in range(3)}
    theirs.load_state_dict(ours.state_dict() | zeros, strict=True)
    x, t, context = noise(2, 4, 8, 8), torch.tensor([3.0, 700.0]), noise(2, 7, TEXT, seed=1)
    wanted = theirs(x, context, t, class_labels=torch.zeros(2, dtype=torch.long)).sample
    same(ours(x, t, context), wanted)


@pytest.mark.parametrize("depth,width,heads,patch", [(2, 128, 2, 2), (1, 384, 6, 4)])
@torch.no_grad()
def test_published_weights_give_the_paper_s_network(depth, width, heads, patch):
    weights = published_weights(depth, width, patch)
    net = DiT.of(dit.configs({k: tuple(v.shape) for k, v in weights.items()})["transformer"])
    mapped = published(weights)
    assert mapped.keys() == net.state_dict().keys() and is_shared(mapped)
    net.load_state_dict(mapped, strict=True)
    x, t = noise(3, 4, 8, 8), torch.tensor([0.0, 251.0, 999.0])
    wanted = reference({k: v.double() for k, v in weights.items()}, x.double(), t, torch.tensor([0, 4, 5]), heads)
    same(net(x, t, one_hot(0, 4, 5)), wanted[:, :4].float())
    same(net.double()(x.double(), t, one_hot(0, 4, 5).double()), wanted[:, :4], 1e-6)  # which tells 1e-6 from 1e-5


def test_mapping_copies_nothing():
    weights = published_weights(2, 64)
    storages = {v.untyped_storage().data_ptr() for v in weights.values()}
    assert {v.untyped_storage().data_ptr() for v in published(weights).values()} <= storages


def test_every_published_name_is_in_the_table_and_strangers_stay():
    weights = published_weights(2, 64)
    assert is_published(weights) and not is_published(published(weights))
    assert published(weights | {"blocks.0.stray": noise(1)}).keys() - published(weights).keys() == {"blocks.0.stray"}
    assert len(set(NAMES.values())) == len(NAMES) == 11


@pytest.mark.parametrize("name", list(SIZES))
def test_sizes_are_read_off_shapes(name):
    layers, heads, width = SIZES[name]
    dim = heads * width
    shapes = {f"blocks.{i}.attn.proj.weight": (dim, dim) for i in range(layers)}
    shapes |= {"x_embedder.proj.weight": (dim, 4, 8, 8), "pos_embed": (1, 16, dim)}
    shapes |= {"final_layer.linear.weight": (256, dim), "y_embedder.embedding_table.weight": (1001, dim)}
    found = dit.configs(shapes)["transformer"]
    assert DiTNetwork().settings_of(found) == DiTSettings(name, 8)
    told = ("in_channels", "out_channels", "sample_size", "num_embeds_ada_norm", "norm_eps", "freq_shift")
    assert [found[key] for key in told] == [4, 4, 32, 1000, 1e-6, 0]


def test_other_widths_have_heads_of_64():
    shapes = {k: tuple(v.shape) for k, v in published_weights(3, 192, 4).items()}
    found = dit.configs(shapes)["transformer"]
    assert DiTNetwork().settings_of(found) == DiTSettings("custom", 4, 3, 3, 64)
    assert (found["in_channels"], found["out_channels"]) == (4, 8)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"pos_embed": ()}, "pos_embed: missing"),
        ({"pos_embed": (1, 15, 64)}, "no square"),
        ({"x_embedder.proj.weight": (64, 4)}, "x_embedder.proj.weight: has shape"),
        ({"x_embedder.proj.weight": (64, 0, 2, 2)}, "x_embedder.proj.weight: has shape"),
        ({"x_embedder.proj.weight": (100, 4, 2, 2)}, "width 100"),
        ({"final_layer.linear.weight": (12, 64)}, "3 channels"),
    ],
)
def test_shapes_of_no_dit_are_named(change, message):
    shapes = {k: tuple(v.shape) for k, v in published_weights(1, 64).items()}
    with pytest.raises(ModelError, match=message) as caught:
        dit.configs(shapes | change)
    assert len(str(caught.value).splitlines()) == 1


def test_learned_places_are_refused():
    weights = published_weights(1, 64)
    with pytest.raises(ModelError, match="learned places"):
        published(weights | {"pos_embed": weights["pos_embed"] + 0.02})


# ---- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_dim", [None, TEXT])
@torch.no_grad()
def test_it_starts_as_nothing_and_every_block_as_the_identity(context_dim):
    torch.manual_seed(0)
    net = DiT(TINY, 4, 8, 0 if context_dim else CLASSES, context_dim)
    context = one_hot(1, 2) if context_dim is None else noise(2, 7, TEXT)
    assert net(noise(2, 4, 8, 8), torch.tensor(3.0), context).abs().max() == 0
    x, c = noise(2, 16, 24), noise(2, 24)
    for block in net.transformer_blocks:
        assert torch.equal(block(x, c, context, (4, 4)), x)
    assert len(net.transformer_blocks) == 3 and isinstance(net.transformer_blocks[0], DiTBlock)


@torch.no_grad()
def test_initial_weights_are_those_of_the_paper():
    torch.manual_seed(0)
    net = DiT(DiTSettings("custom", 2, 1, 4, 64), 4, 8, 1000)
    block, emb = net.transformer_blocks[0], net.transformer_blocks[0].norm1.emb
    small = emb.timestep_embedder.linear_1, emb.timestep_embedder.linear_2, emb.class_embedder.embedding_table
    assert [p.weight.std().item() for p in small] == pytest.approx([0.02] * 3, rel=0.02)
    for layer in (net.pos_embed.proj, block.attn1.to_q, block.ff.net[0].proj, block.ff.net[2]):
        bound = (6 / (layer.weight[0].numel() + len(layer.weight))) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() == 0


@pytest.mark.parametrize("options", [{"classes": CLASSES}, {"context_dim": TEXT}])
def test_every_weight_learns(options):
    net = make(**options)
    context = noise(2, 7, TEXT) if "context_dim" in options else torch.full((2, 1, CLASSES + 1), 1 / (CLASSES + 1))
    net(noise(2, 4, 8, 8), torch.tensor([1.0, 500.0]), context).square().sum().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in silent if not n.endswith("to_k.bias")] == []


# ---- conditions and sizes ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_scalar_time_is_that_time_for_all():
    net, x, y = make(), noise(3, 4, 8, 8), one_hot(0, 1, 2)
    torch.testing.assert_close(net(x, torch.tensor(7.0), y), net(x, torch.full((3,), 7.0), y))
    assert (net(x, torch.tensor(8.0), y) - net(x, torch.tensor(7.0), y)).abs().max() > 1e-4


@torch.no_grad()
def test_a_mixture_of_labels_is_the_mixture_of_their_vectors():
    net, x, t = make(), noise(1, 4, 8, 8), torch.tensor(300.0)
    mixed = net(x, t, 0.25 * one_hot(1) + 0.75 * one_hot(3))
    table = net.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    table[CLASSES] = 0.25 * table[1] + 0.75 * table[3]
    torch.testing.assert_close(mixed, net(x, t, one_hot(CLASSES)))
    assert (mixed - net(x, t, one_hot(1))).abs().max() > 1e-3


@pytest.mark.parametrize("h,w,base", [(4, 4, 4), (6, 2, 4)])
def test_places_span_the_square_it_was_trained_on(h, w, base):
    width = 16
    rows, columns = np.divmod(np.arange(h * w), w)
    rate = 10000.0 ** -(np.arange(4) / 4)
    wanted = [f(a[:, None] * rate) for a in (columns * base / w, rows * base / h) for f in (np.sin, np.cos)]
    found = positions(h, w, base, rates(width)).numpy()
    np.testing.assert_allclose(found, np.concatenate(wanted, axis=1), atol=1e-6)


@pytest.mark.parametrize("name,millions", {"S": 33, "B": 130, "L": 458, "XL": 675}.items())
def test_parameters_are_as_many_as_in_the_paper(name, millions):
    with torch.device("meta"):
        net = DiT(DiTSettings(name, 2), 4, 32, 1000, learned_sigma=True)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


# ---- one embedding or many ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_shared_is_one_set_of_weights_under_every_name():
    net = make()
    state = net.state_dict()
    copies = [v for k, v in state.items() if k.endswith("embedding_table.weight")]
    assert len(copies) == 3 and len({v.data_ptr() for v in copies}) == 1 and is_shared(state)
    assert len(list(net.parameters())) == len(state) - 2 * 5
    apart = DiT(TINY, 4, 8, CLASSES, shared=False)
    apart.load_state_dict(state, strict=True)
    x, t, y = noise(2, 4, 8, 8), torch.tensor([5.0, 800.0]), one_hot(2, CLASSES)
    torch.testing.assert_close(apart(x, t, y), net(x, t, y))
    assert is_shared(apart.state_dict()) and not is_shared(make(shared=False).state_dict())


def test_one_block_that_differs_is_not_shared():
    state = {k: v.clone() for k, v in make().state_dict().items()}
    assert is_shared(state)
    state["transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"][3] += 1e-6
    assert not is_shared(state)


# ---- configuration -----------------------------------------------------------------------------------------------------


def test_configuration_is_checked_like_the_others():
    problems: list[str] = []
    built = build(DiTSettings, {"size": "XXL", "patch_size": 16, "num_layer": 3}, "dit.", problems)
    assert built == DiTSettings() and len(problems) == 3
    assert "dit.size: unknown name 'XXL'" in problems[0] and "(did you mean 'num_layers'?)" in problems[2]


def test_what_does_not_fit_together_is_named():
    assert conflicts(DiTSettings("XL", 4), 32) == []
    assert DiTSettings("XL").shape == (28, 16, 72) and TINY.shape == (3, 2, 12)
    assert [p.split(":")[0] for p in conflicts(DiTSettings("S", 3), 32)] == ["patch_size"]
    assert conflicts(DiTSettings("S", 8), 12) == ["patch_size: 8 does not divide the latents' side 12"]
    assert [p.split(":")[0] for p in conflicts(DiTSettings("custom", 2, 1, 1, 6), 8)] == ["attention_head_dim"]


def test_named_sizes_are_found_by_name():
    def sizes(layers: int, heads: int, width: int) -> dict:
        table = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width // heads}
        return table | {"patch_size": 2}

    assert DiTNetwork().settings_of(sizes(28, 16, 1152)) == DiTSettings("XL", 2)
    assert DiTNetwork().settings_of(sizes(28, 18, 1152)).shape == (28, 18, 64)


# ---- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"classes": CLASSES}, {"context_dim": TEXT, "cfg": replace(TINY, qk_norm=True)}])
@torch.no_grad()
def test_it_exports_with_free_height_and_width(options, tmp_path):
    import onnxruntime

    net, text = make(**options), "context_dim" in options
    context = noise(2, 7, TEXT) if text else one_hot(1, 2)
    axes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with export.quiet():
        program = torch.onnx.export(
            net,
            (noise(2, 4, 8, 12), torch.tensor(601.0), context),
            dynamo=True,
            dynamic_shapes=(axes, {}, {0: torch.export.Dim.DYNAMIC} | ({1: torch.export.Dim.DYNAMIC} if text else {})),
            input_names=["sample", "timestep", "encoder_hidden_states"],
            opset_version=export.OPSET,
            verbose=False,
            custom_translation_table=export.translations(),
        )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in ((3, 4, 6, 10), (1, 4, 8, 8)):
        context = noise(size[0], 3, TEXT, seed=2) if text else one_hot(*range(size[0]))
        inputs = noise(*size, seed=3), torch.tensor(41.0), context
        feed = dict(zip(("sample", "timestep", "encoder_hidden_states"), (i.numpy() for i in inputs), strict=True))
        same(torch.from_numpy(session.run(None, feed)[0]), net(*inputs), 2e-5)


def conflicts(cfg: DiTSettings, side: int) -> list[str]:
    """What a configuration says of a DiT on latents of `side` a side."""
    whole = config.make(denoiser={"kind": "dit"}, dit=cfg, data={"resolution": 4 * side})
    assert whole.latents["sample_size"] == side
    return list(DENOISERS["dit"].conflicts(whole))
