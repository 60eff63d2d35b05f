"""Stage 1's losses against colour matrices, brute force and finite differences, and that what they need is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forker import Forker
from PIL import Image
from runs import said, sha256, untimed

from tinydiff import config
from tinydiff.checkpoints import folder
from tinydiff.checkpoints.source import Source
from tinydiff.data.dataset import Images, open_source
from tinydiff.errors import ModelError, UsageError, UserError
from tinydiff.measure.features import open_features
from tinydiff.models.autoencoder import Codebook
from tinydiff.models.critic import Critic
from tinydiff.schema import to_toml
from tinydiff.stages import AutoencoderStage
from tinydiff.training import claim, loop
from tinydiff.training.autoencoder import AutoencoderTask
from tinydiff.training.losses import autoencoder_loss, balance, chroma, hinge
from tinydiff.training.reconstruct import Quantise, draw, turned
from tinydiff.training.run import Run
from tinydiff.training.state import Learner, Training

CODES = 16


def of_autoencoder(cfg: config.Config, **keys: object) -> config.Config:
    """The configuration with some keys of [train.autoencoder] changed."""
    return replace(cfg, train=replace(cfg.train, autoencoder=replace(cfg.train.stage("autoencoder"), **keys)))


@pytest.fixture(scope="module")
def models(tiny_config: config.Config, tiny_model: Path, make_model: Callable[..., Path]) -> dict[str, Path]:
    """Model folders of both kinds, every parameter random."""
    quantised = replace(tiny_config.autoencoder, kind="vq", num_vq_embeddings=CODES)
    return {"kl": tiny_model, "vq": make_model(replace(tiny_config, autoencoder=quantised))}


@pytest.fixture
def task(tiny_config: config.Config, models: dict[str, Path], tmp_path: Path) -> Callable[..., AutoencoderTask]:
    """A function (keys of the stage) -> the task over a fresh model, its random weights always the same."""

    def make(kind: str = "kl", resolution: int = 16, **keys: object) -> AutoencoderTask:
        cfg = of_autoencoder(replace(tiny_config, data=replace(tiny_config.data, resolution=resolution)), **keys)
        run = Run(loop.Runtime(cfg), tmp_path)
        run.data, run.model = Images(open_source(cfg.data), cfg.data), folder.load(Source(models[kind]))
        made = AutoencoderTask(run)
        made.rows = claim.split(range(4), made.name, made.settings, made.whole, run.world)
        return made

    return make


def test_chroma_is_that_of_pillow() -> None:
    """JPEG's YCbCr of saturated colours and greys, which Pillow rounds to bytes."""
    rng = np.random.default_rng(0)
    rgb = np.concatenate([rng.integers(0, 256, (62, 1, 3)), [[[255, 0, 0]], [[90, 90, 90]]]]).astype(np.uint8)
    wanted = np.array(Image.fromarray(rgb).convert("YCbCr"))[..., 1:].astype(int) - 128
    found = chroma(torch.from_numpy(rgb / 127.5 - 1).permute(2, 0, 1)[None])[0].permute(1, 2, 0) * 127.5
    assert np.abs(found.numpy() - wanted).max() <= 1


def test_chroma_weighs_errors_of_colour_and_not_of_brightness() -> None:
    cfg, pixels = AutoencoderStage(chroma_weight=3.0), torch.zeros(1, 3, 4, 4)
    assert autoencoder_loss(pixels, pixels + 0.5, {}, cfg)["chroma"].item() == pytest.approx(0, abs=1e-6)
    bluer = pixels + torch.tensor([0, 0, 0.4])[:, None, None]
    cb, cr = 0.4 * (1 - 0.114) / 1.772, -0.4 * 0.114 / 1.402
    assert autoencoder_loss(pixels, bluer, {}, cfg)["chroma"].item() == pytest.approx(3 * (cb - cr) / 2)


def test_the_perceptual_term_is_the_mean_distance_of_features(task: Callable[..., AutoencoderTask]) -> None:
    plain, other = task(), task(perceptual_weight=0.7)
    batch = plain.batch(2, range(4))
    with torch.no_grad():
        output = plain.players["autoencoder"].network(batch["pixels"], batch["noise"], batch["turn"][0].tolist())[0]
        pairs, features = zip(batch["pixels"].split(1), output.split(1), strict=True), open_features()
        wanted = 0.7 * sum(features.distance(x, y).item() for x, y in pairs) / 4
        (loss, terms), (before, _) = (each.loss("autoencoder", batch) for each in (other, plain))
    assert terms["perceptual"][0].item() == pytest.approx(wanted, rel=1e-4) and wanted > 0
    assert loss.item() - before.item() == pytest.approx(wanted, rel=1e-3)


def test_its_gradient_is_that_of_finite_differences(task: Callable[..., AutoencoderTask]) -> None:
    made = task(perceptual_weight=1.0, chroma_weight=1.0)
    batch, weight = made.batch(0, range(4)), made.model.vae.decoder.conv_out.weight
    made.loss("autoencoder", batch)[0].backward()
    assert weight.grad is not None
    direction, losses = weight.grad / weight.grad.norm(), []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            weight += step * direction
            losses.append(made.loss("autoencoder", batch)[0].item())
            weight -= step * direction
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(weight.grad.norm().item(), rel=1e-2)


def test_another_feature_network_than_the_run_was_begun_with_is_refused(task: Callable[..., AutoencoderTask]) -> None:
    made = task(perceptual_weight=1.0)
    made.restore(made.state())
    made.restore({})
    with pytest.raises(ModelError, match="not the feature network that the run was begun with"):
        made.restore({"features": "0" * 64})
    made.run.claim.accept = True
    made.restore({"features": "0" * 64})
    assert task().state() == {}


def test_a_feature_network_that_is_missing_is_told_before_anything_is_written(run_config, tmp_path: Path) -> None:
    cfg = of_autoencoder(run_config, perceptual_weight=1.0, features=str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match=r"none\.pth"):
        loop.run(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- the critic


@pytest.mark.parametrize(("halvings", "seen"), [(1, 12), (2, 26), (3, 54)])
def test_a_logit_of_the_critic_sees_its_patch_of_its_own_image(halvings: int, seen: int) -> None:
    """By gradients: how many pixels along a side change a logit in the middle, and none of another image."""
    torch.manual_seed(0)
    critic, x = Critic(8, halvings), torch.randn(2, 3, 128, 128, requires_grad=True)
    for layer in critic.layers:
        if isinstance(layer, torch.nn.GroupNorm):  # it sees the whole image
            layer.forward = lambda x: x  # type: ignore[method-assign]
    logits = critic(x)
    assert logits.shape == (2, 1, 128 // 2**halvings, 128 // 2**halvings)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert x.grad is not None
    assert [int(x.grad[0].abs().sum((0, axis)).count_nonzero()) for axis in (1, 2)] == [seen, seen]
    assert x.grad[1].count_nonzero() == 0


@pytest.mark.parametrize("resolution", [8, 12, 16, 32])
@pytest.mark.parametrize("halvings", [1, 2, 3])
@pytest.mark.parametrize("equivariance", [0.0, 1.0])
def test_images_too_small_for_the_critic_are_refused_and_no_others(
    task: Callable[..., AutoencoderTask], resolution: int, halvings: int, equivariance: float
) -> None:
    """As small as equivariance makes them, which is drawn at each update."""
    least = 2 * min(draw(0, step, equivariance, resolution // 2, resolution // 2)[0] for step in range(2000))
    keys = {"adversarial_weight": 1.0, "critic_halvings": halvings, "critic_width": 8, "equivariance": equivariance}
    image = torch.zeros(1, 3, least, least)
    try:
        critic = task(resolution=resolution, **keys).players["critic"].module
    except UsageError as error:
        assert str(error).startswith("train.autoencoder.critic_halvings: ") and "raise data.resolution" in str(error)
        with pytest.raises(RuntimeError):
            Critic(8, halvings)(image)
    else:
        assert critic(image).numel() >= 1


def test_images_too_small_for_a_feature_network_are_refused_before_an_update(
    task: Callable[..., AutoencoderTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinydiff.measure.efficientnet.EfficientNetLite0.smallest", 16)
    assert task(perceptual_weight=1.0).features
    for keys in ({"resolution": 8}, {"equivariance": 0.5}):
        with pytest.raises(UsageError, match="needs images of 16 pixels or more; name another"):
            task(perceptual_weight=1.0, **keys)


def test_the_critic_judges_each_image_by_itself_whatever_its_size() -> None:
    torch.manual_seed(0)
    critic, x = Critic(16, 3), torch.randn(3, 3, 40, 24)
    with torch.no_grad():
        torch.testing.assert_close(critic(x), torch.cat([critic(row) for row in x.split(1)]), rtol=1e-4, atol=1e-5)
        assert critic(x[..., :8, :9]).shape == (3, 1, 1, 1)


def test_hinge_and_balance_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 0.5])
    assert hinge(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 1.5) / 3))
    assert balance(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])) == pytest.approx(5 / (2 + 1e-4))
    assert balance(torch.tensor([3e9]), torch.tensor([0.0])) == 1e4


EVERY = {"perceptual_weight": 0.1, "chroma_weight": 1.0, "equivariance": 0.5}
EVERY |= {"adversarial_weight": 0.5, "adversarial_start": 3, "critic_width": 8}


def trained(task: AutoencoderTask) -> Training:
    world = task.run.world
    return Training([Learner.of(k, p.module, p.settings, world) for k, p in task.players.items()])


def updates(task: AutoencoderTask, count: int) -> list[dict[str, float]]:
    training = trained(task)
    return [loop.step(task.run, task, training, n, loop.parts_of(task, n)).values for n in range(count)]


def test_the_balance_is_the_ratio_of_gradients_at_the_last_layer(task: Callable[..., AutoencoderTask]) -> None:
    """Esser et al. 2021, equation 7, by the whole backward pass of each loss alone; the update after it is weighed so."""
    keys = {"adversarial_weight": 0.5, "critic_width": 8, "perceptual_weight": 0.1}
    made, fresh = task(**keys, accumulate=2), task(**keys)
    made.rows = [range(2), range(2, 4)]
    (first,) = updates(made, 1)
    batch, norms = fresh.batch(0, range(4)), []
    for alone in (True, False):
        vae = fresh.model.vae
        vae.zero_grad()
        if alone:  # its own balance is 0 still
            fresh.loss("autoencoder", batch)[0].backward()
        else:
            output = fresh.players["autoencoder"].network(batch["pixels"], batch["noise"], [8, 8, 0])[0]
            (-fresh.players["critic"].module(output).mean()).backward()
        norms.append(vae.decoder.conv_out.weight.grad.norm().item())
    assert made.balance == pytest.approx(norms[0] / (norms[1] + 1e-4), rel=1e-4)
    assert first["adversarial"] == 0 and first["critic_loss"] > 0
    again = made.batch(1, range(4))
    with torch.no_grad():
        loss, terms = made.loss("autoencoder", again)
        output = made.drawn[0][1]
        wanted = -0.5 * made.balance * made.players["critic"].module(output).mean()
    assert terms["adversarial"][0].item() == pytest.approx(wanted.item(), rel=1e-5) and wanted != 0
    assert loss.item() == pytest.approx(sum(t[0].item() for t in terms.values()), rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_parts_of_a_batch_learn_what_the_whole_does(kind: str, task: Callable[..., AutoencoderTask]) -> None:
    keys = EVERY | {"adversarial_start": 0}
    whole, parts = task(kind, **keys), task(kind, **keys, accumulate=2)
    parts.rows = [range(2), range(2, 4)]
    for one, other in zip(updates(whole, 6), updates(parts, 6), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4)
    assert whole.balance == pytest.approx(parts.balance, rel=1e-4) and whole.balance > 0


def test_the_critic_waits_and_changes_nothing_until_its_start(task: Callable[..., AutoencoderTask]) -> None:
    alone, judged = task(), task(adversarial_weight=0.5, adversarial_start=2, critic_width=8)
    before = [p.detach().clone() for p in judged.players["critic"].module.parameters()]
    ours, theirs = updates(alone, 4), updates(judged, 4)
    assert all(row["loss"] == other["loss"] for row, other in zip(ours[:3], theirs[:3], strict=True))
    assert [row["critic_loss"] > 0 for row in theirs] == [False, False, True, True]
    assert theirs[3]["loss"] != ours[3]["loss"]
    after = [p.detach() for p in judged.players["critic"].module.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True) if a.ndim > 1)


def test_the_critic_learns_to_tell_images_from_reconstructions(task: Callable[..., AutoencoderTask]) -> None:
    made = task(adversarial_weight=0.1, critic_width=16, critic_lr=2e-3, warmup=0, lr=1e-6)
    rows = updates(made, 30)
    assert rows[-1]["critic_loss"] < 0.5 * rows[0]["critic_loss"]
    assert rows[-1]["critic_real"] > 0.3 > -0.3 > rows[-1]["critic_fake"]


# ---------------------------------------------------------------------------------------------------- scaled and turned


def test_latents_and_images_are_turned_alike() -> None:
    """An image of one colour a latent: what is made of the latents' turn is the image's turn."""
    latents = torch.randn(2, 3, 8, 6)
    image = latents.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for quarters in range(4):
        small, large = turned(latents, [8, 6, quarters]), turned(image, [8, 6, quarters], 4)
        assert torch.equal(large, small.repeat_interleave(4, 2).repeat_interleave(4, 3))
        by_hand = np.rot90(latents.numpy(), quarters, (2, 3))
        assert np.array_equal(small.numpy(), by_hand)
    half, halved = turned(latents, [4, 3, 0]), turned(image, [4, 3, 0], 4)
    torch.testing.assert_close(half, torch.nn.functional.avg_pool2d(latents, 2))
    assert halved.shape == (2, 3, 16, 12)
    flat = torch.full((1, 3, 32, 24), 0.3)
    torch.testing.assert_close(turned(flat, [3, 2, 1], 4), torch.full((1, 3, 8, 12), 0.3))


def test_turns_are_drawn_as_often_and_as_far_as_they_should_be() -> None:
    drawn = [draw(0, step, 0.6, 16, 32) for step in range(3000)]
    changed = np.array([turn for turn in drawn if turn != [16, 32, 0]])
    assert len(changed) / 3000 == pytest.approx(0.6, abs=0.04)
    assert np.bincount(changed[:, 2]).tolist()[0] == 0 and np.bincount(changed[:, 2])[1:].min() > 500
    assert changed[:, 0].min() == 4 and changed[:, 0].max() == 16
    assert np.abs(changed[:, 1] - 2 * changed[:, 0]).max() <= 1
    assert drawn[7] == draw(0, 7, 0.6, 16, 32) and all(draw(1, n, 0.0, 8, 8) == [8, 8, 0] for n in range(50))


def test_the_target_of_a_turned_batch_is_the_turned_image(task: Callable[..., AutoencoderTask]) -> None:
    made = task(equivariance=1.0, l2_weight=0.0, edge_weight=0.0, kl_weight=0.0)
    steps = [made.batch(n, range(4)) for n in range(30)]
    batch = next(batch for batch in steps if batch["turn"][0, 0] < 8)
    turn = batch["turn"][0].tolist()
    with torch.no_grad():
        loss, _ = made.loss("autoencoder", batch)
        moments = made.model.vae.encode(batch["pixels"])
        z = moments[:, :4] + (0.5 * moments[:, 4:]).exp() * batch["noise"]
        small = torch.nn.functional.interpolate(z, turn[:2], mode="bilinear")
        output = made.model.vae.decode(small.rot90(turn[2], (2, 3)))
        wanted = torch.nn.functional.interpolate(
            batch["pixels"], [2 * side for side in turn[:2]], mode="bilinear", antialias=True
        )
    assert loss.item() == pytest.approx((output - wanted.rot90(turn[2], (2, 3))).abs().mean().item(), rel=1e-4)


# -------------------------------------------------------------------------------------------------------- the codebook


@pytest.mark.peers
@pytest.mark.parametrize("attention", [False, True])
def test_a_vq_is_the_vqmodel_of_diffusers(attention: bool, tiny_config, make_model, tmp_path: Path) -> None:
    """A folder of ours there: latents, images and the loss of both terms, with its gradient to the pixels."""
    from diffusers import VQModel

    keys = {"kind": "vq", "num_vq_embeddings": CODES, "mid_block_add_attention": attention, "latent_channels": 3}
    path = make_model(replace(tiny_config, autoencoder=replace(tiny_config.autoencoder, **keys)))
    theirs, ours = VQModel.from_pretrained(path / "vae"), folder.load(Source(path)).vae
    assert theirs.config.scaling_factor == 0.8 and theirs.config.num_vq_embeddings == CODES
    theirs.quantize.legacy = False  # the published formula, not the one with the weight on the wrong term
    x, y = (torch.rand(2, 3, 16, 16).mul(2).sub(1) for _ in range(2))
    x.requires_grad_()
    z = theirs.encode(x).latents
    torch.testing.assert_close(ours.encode(x), z, rtol=1e-4, atol=1e-5)
    drawn, loss = theirs.decode(z, return_dict=False)
    torch.testing.assert_close(ours.decode(ours.encode(x)), drawn, rtol=1e-4, atol=1e-4)
    ((drawn - y).abs().mean() + loss).backward()
    wanted, x.grad = x.grad, None
    cfg = AutoencoderStage(codebook="commitment", commitment_weight=0.25)
    network = Quantise(ours, cfg)
    output, *latent = network(x, torch.empty(0), [8, 8, 0])
    terms = network.terms(latent, cfg)
    torch.testing.assert_close(terms["commitment"] + terms["codebook"], loss, rtol=1e-4, atol=1e-6)
    ((output - y).abs().mean() + terms["commitment"] + terms["codebook"]).backward()
    torch.testing.assert_close(x.grad, wanted, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        ours.quantize.embedding.weight.grad, theirs.quantize.embedding.weight.grad, rtol=1e-3, atol=1e-6
    )


def test_the_nearest_vector_by_brute_force() -> None:
    torch.manual_seed(0)
    book, z = Codebook(40, 3), torch.randn(2, 3, 5, 4)
    torch.nn.init.normal_(book.embedding.weight)
    codes, vectors = book.codes(z), book(z)
    for b, i, j in np.ndindex(2, 5, 4):
        distances = [(z[b, :, i, j] - each).norm().item() for each in book.embedding.weight]
        assert codes[b, i, j] == int(np.argmin(distances))
        assert torch.equal(vectors[b, :, i, j], book.embedding.weight[codes[b, i, j]])


def test_moving_averages_of_the_codebook_by_hand(task: Callable[..., AutoencoderTask]) -> None:
    """Three updates, latent by latent, and what is hardly used begins again as a latent of the batch."""
    made = task("vq", lr=0.0, weight_decay=0.0)
    made.rows = [range(4)]
    network, weight = made.trained, made.model.vae.quantize.embedding.weight
    assert "usage" in dict(network.named_buffers()) and not any("embedding" in n for n, _ in network.named_parameters())
    training, use, usual, restarted = trained(made), np.zeros(CODES), 4 * 64 / CODES, 0
    for n in range(3):
        book, batch = weight.numpy().astype(np.float64).copy(), made.batch(n, range(4))
        with torch.no_grad():
            z = made.model.vae.encode(batch["pixels"]).permute(0, 2, 3, 1).reshape(-1, 4).numpy().astype(np.float64)
        nearest = [int(((book - each) ** 2).sum(1).argmin()) for each in z]
        values = loop.step(made.run, made, training, n, [batch]).values
        share = np.bincount(nearest, minlength=CODES) / len(z)
        assert values["used"] == pytest.approx((share > 0).mean())
        assert values["perplexity"] == pytest.approx(np.exp(-sum(p * np.log(p) for p in share if p)), rel=1e-4)
        for k in range(CODES):
            mine = [each for each, code in zip(z, nearest, strict=True) if code == k]
            total = 0.99 * use[k] + 0.01 * len(mine)
            if total < 0.03 * usual:
                assert np.abs(z - weight[k].numpy()).max(1).min() < 1e-4  # some latent
                use[k], restarted = usual, restarted + 1
            else:
                wanted = (0.99 * use[k] * book[k] + 0.01 * sum(mine, np.zeros(4))) / total
                np.testing.assert_allclose(weight[k].numpy(), wanted, rtol=1e-3, atol=1e-4)
                use[k] = total
        np.testing.assert_allclose(network.usage.numpy(), use, rtol=1e-4)
    assert restarted >= 3
    assert len(np.unique(weight.numpy().round(5), axis=0)) > CODES // 2


def test_vectors_begin_again_as_the_same_latents_in_any_division(task: Callable[..., AutoencoderTask]) -> None:
    made = task("vq")
    batch = made.batch(0, range(4))
    latent = made.trained(batch["pixels"], batch["noise"], [8, 8, 0])[1:]
    whole = made.trained.seen(latent, 0, 4, np.random.default_rng(3))
    parts = [made.trained.seen([t[i : i + 1] for t in latent], i, 4, np.random.default_rng(3)) for i in range(4)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole)
    z = latent[0].permute(0, 2, 3, 1).reshape(-1, 4)
    assert all((z == row).all(1).any() for row in whole[:, 5:])


@pytest.mark.parametrize("codebook", ["ema", "commitment"])
def test_a_codebook_learns_to_stand_for_the_latents(codebook: str, task: Callable[..., AutoencoderTask]) -> None:
    made = task("vq", codebook=codebook, lr=3e-3, warmup=0, commitment_weight=1.0)
    rows = updates(made, 40)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and rows[-1]["commitment"] < 0.8 * rows[0]["commitment"]
    assert codebook == "commitment" or rows[-1]["used"] > 0.5


def test_latents_of_a_vq_are_those_before_the_codebook(models: dict[str, Path], backend) -> None:
    """What the denoiser learns, and what `generate` changes of an image: no deviation, and the decoder quantises."""
    vae = folder.load(Source(models["vq"])).vae
    x = torch.rand(2, 3, 16, 16).mul(2).sub(1)
    mean, std = vae.distribution(x)
    assert torch.equal(mean, vae.encode(x)) and mean.shape == (2, 4, 8, 8) and not std.any()
    assert torch.equal(vae.decode(mean), vae.decode(vae.quantize(mean)))
    assert len(vae.quantize(mean).permute(0, 2, 3, 1).reshape(-1, 4).unique(dim=0)) <= CODES


def test_a_given_vq_says_its_kind(models: dict[str, Path]) -> None:
    cfg = config.load(None, [f"autoencoder.path={models['vq']}", "data.resolution=32"])
    assert (cfg.autoencoder.kind, cfg.autoencoder.num_vq_embeddings) == ("vq", CODES)


# ------------------------------------------------------------------------------------------------------ killed, resumed


def left(run_dir: Path) -> dict[str, str]:
    """SHA-256 of all that the last checkpoint and the autoencoder's own folder hold, and what was measured."""
    paths = [*run_dir.glob("checkpoints/*-00000012/*"), *run_dir.glob("autoencoder/*")]
    found = {k: v for k, v in sha256(run_dir, paths).items() if "toml" not in k}
    assert len(found) > 7
    return found | {"log": str(untimed(run_dir))}


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_killed_at_random_moments_it_ends_in_the_same_bits(kind: str, run_config, forker: Forker, tmp_path) -> None:
    """With all losses, two players and turned latents, the critic beginning between two checkpoints."""
    path = tmp_path / "every.toml"
    cfg = of_autoencoder(run_config, **EVERY, save_every=2)
    cfg = replace(cfg, train=replace(cfg.train, denoiser=replace(cfg.train.denoiser, steps=0)))
    cfg = replace(cfg, autoencoder=replace(cfg.autoencoder, kind=kind, num_vq_embeddings=CODES))
    path.write_text(to_toml(cfg))

    assert forker.run(tmp_path / "whole", config_path=path) == 0, said(tmp_path / "whole")
    rng, codes = np.random.default_rng(0), []
    while not codes or codes[-1]:
        codes.append(forker.run(tmp_path / "killed", int(rng.integers(8, 40)) * (len(codes) < 5), config_path=path))
    assert len(codes) > 3
    assert left(tmp_path / "killed") == left(tmp_path / "whole")
