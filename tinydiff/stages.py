"""The stages of training, in order, without torch: the loop, the configuration, the command line and the report read this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinydiff.adapters import STYLES, WORD_STYLES
from tinydiff.networks.contrastive import CONTRASTIVE, Towers
from tinydiff.schema import key, section

OPTIMIZERS = ("adamw", "muon")
CONTROL = "control"
MADE, GIVEN = ("edges", "colour", "luminance"), "images"  # conditions that control a picture
FEATURES = "the network of these features: a name, a file, or files joined by commas; empty is efficientnet-lite0"


@dataclass(frozen=True)
class Stage:
    steps: int = key(2000, "updates; 0 leaves the stage out", 0)
    batch_size: int = key(64, "images an update", 1)
    accumulate: int = key(1, "parts a batch is computed in, to save memory; must divide batch_size", 1)
    optimizer: str = key("adamw", "adamw, or muon for matrices and kernels and adamw for the rest", choices=OPTIMIZERS)
    lr: float = key(1e-3, "peak learning rate", 0)
    warmup: int = key(100, "updates of linear warm-up before the cosine decay", 0)
    final_lr: float = key(0.01, "learning rate at the last update, as a share of the peak", 0, 1)
    weight_decay: float = key(0.01, "AdamW's decoupled decay", 0)
    beta2: float = key(0.99, "AdamW's second-moment decay", 0, 1)
    clip: float = key(1.0, "largest gradient norm", 0)
    ema: float = key(0.999, "decay of the averaged weights that the model folder holds", 0, 1)
    save_every: int = key(500, "updates between checkpoints", 1)
    sample_every: int = key(500, "updates between pictures", 1)

    @property
    def caption(self) -> str:
        """What all images are said to show; "" where their own captions are read."""
        return ""

    @property
    def rows(self) -> int:
        """Images computed at once: of an update, and of what is computed beside it."""
        return max(1, self.batch_size // self.accumulate)


@dataclass(frozen=True)
class AutoencoderStage(Stage):
    kl_weight: float = key(2e-4, "weight of the Kullback-Leibler term, per latent value", 0)
    l2_weight: float = key(1.0, "weight of the squared error beside the absolute error", 0)
    edge_weight: float = key(1.0, "weight of the absolute error of differences between neighbours", 0)
    chroma_weight: float = key(0.0, "weight of the absolute error of the two colour differences, Cb and Cr", 0)
    perceptual_weight: float = key(0.0, "weight of the distance between features of image and reconstruction", 0)
    features: str = key("", FEATURES)
    adversarial_weight: float = key(
        0.0, "weight of a patch discriminator's loss, balanced with the others' gradients", 0
    )
    adversarial_start: int = key(0, "update from which on that discriminator, the critic, learns and judges", 0)
    critic_lr: float = key(5e-4, "the critic's peak learning rate", 0)
    critic_width: int = key(32, "the critic's channels after its first layer", 8, 512)
    critic_halvings: int = key(2, "how often the critic halves the image: a logit sees 26 pixels at 2, 54 at 3", 1, 3)
    codebook: str = key(
        "ema", "how a vq's codebook learns: by moving averages, or by a loss", choices=("ema", "commitment")
    )
    commitment_weight: float = key(0.25, "vq: weight of the squared distance from latents to their vectors", 0)
    equivariance: float = key(0.0, "share of updates whose latents are scaled and turned, and the images too", 0, 1)


@dataclass(frozen=True)
class ContrastiveStage(Towers, Stage):
    pass


@dataclass(frozen=True)
class DenoiserStage(Stage):
    exit_weight: float = key(0.5, "of a dit with exits: weight of their outputs' loss, and of their confidence's", 0)
    alignment_weight: float = key(0.0, "weight of the distance of inner features from those of a feature network", 0)
    features: str = key("", FEATURES)


@dataclass(frozen=True)
class DistillStage(Stage):
    cfg_scale: float = key(3.0, "guidance of the teacher, which drawing then needs no more", 1, 100)
    calls: int = key(4, "network calls of a picture; others may be asked for that divide `levels`", 1, 1000)
    levels: int = key(20, "noise levels that are learnt, each from the next; a multiple of `calls`", 1, 1000)
    solver_steps: int = key(1, "steps of the teacher from each of these levels to the next", 1, 100)


@dataclass(frozen=True)
class LoraStage(Stage):
    rank: int = key(8, "of each change; none may be above a side of the matrix that it changes", 1, 4096)
    alpha: float = key(8.0, "a change is multiplied by alpha / rank", 1e-3, 1e5)
    targets: str = key("to_q, to_k, to_v, to_out.0", "ends of the names of the linear and convolution layers to change")
    text_encoder: bool = key(False, "change the text encoders too, their attention and perceptrons")
    dora: bool = key(False, "learn how long each row of a changed matrix is apart from where it points (DoRA)")
    style: str = key("diffusers", "whose names the published file has", choices=STYLES)


@dataclass(frozen=True)
class ControlStage(Stage):
    condition: str = key(
        "edges",
        "what a picture is controlled by: made of it, or the images that its table names",
        choices=(*MADE, GIVEN),
    )


@dataclass(frozen=True)
class WordStage(Stage):
    word: str = key("<word>", "what stands in prompts for what the images show")
    vectors: int = key(1, "how many tokens it is", 1, 64)
    initial: str = key("", "words of the model that its vectors begin as the mean of; empty is all of them")
    prompt: str = key("a picture of {}", "the caption of every image, with the word where {} is")
    style: str = key("diffusers", "whose names the published file has", choices=WORD_STYLES)

    @property
    def caption(self) -> str:
        """What every image is said to show, whatever its own captions are."""
        return self.prompt.replace("{}", self.word)


@dataclass(frozen=True)
class Row:
    """A stage: the table of its settings under [train], where its task is ("package.module:Class"), what its pictures are."""

    settings: type
    section: Any
    task: str
    pictures: str
    halves: tuple[str, str] | None = None  # what stands above and below in a picture
    loss: str = "loss"  # which measure of an update is compared with the same of held-out images
    divided: bool = False  # whether fsdp divides its network among processes
    follows: bool = False  # whether it goes on from a model that is opened
    adapter: bool = False  # whether it trains what changes a model that itself stays as it is
    share: float = 1.0  # of the time of a run, beside the other stages


STAGES: dict[str, Row] = {
    "autoencoder": Row(
        AutoencoderStage,
        section(
            AutoencoderStage,
            "stage 1: image -> latent -> image",
            steps=800,
            optimizer="muon",
            lr=3e-3,
            warmup=30,
            save_every=400,
            sample_every=400,
        ),
        "tinydiff.training.autoencoder:AutoencoderTask",
        "images of the data above, their reconstructions below",
        ("images", "reconstructions"),
        "l1",
        share=0.35,
    ),
    CONTRASTIVE: Row(
        ContrastiveStage,
        section(
            ContrastiveStage,
            "between them, where it has steps: text encoder and an image tower, by which caption goes with which image",
            steps=0,
            batch_size=256,
        ),
        "tinydiff.training.contrastive:ContrastiveTask",
        "images of some captions above, the images nearest to these captions below",
        ("images of captions", "nearest to the captions"),
        share=0.2,
    ),
    "denoiser": Row(
        DenoiserStage,
        section(
            DenoiserStage,
            "stage 2: text encoder and denoiser on the latents",
            steps=2000,
            optimizer="muon",
            lr=2.5e-3,
            warmup=200,
            ema=0.998,
        ),
        "tinydiff.training.denoiser:DenoiserTask",
        "generated from these captions, row by row",
        divided=True,
        follows=True,
    ),
    "distill": Row(
        DistillStage,
        section(DistillStage, "stage 3: the denoiser, to draw in few calls", steps=0, lr=2e-4, warmup=20, ema=0.98),
        "tinydiff.training.distill:DistillTask",
        "generated from these captions in few calls, row by row",
        divided=True,
        follows=True,
        share=0.2,
    ),
    "lora": Row(
        LoraStage,
        section(
            LoraStage,
            "with adapter lora: changes of low rank of the layers of a model",
            steps=1000,
            batch_size=16,
            lr=1e-4,
            warmup=20,
            ema=0.99,
        ),
        "tinydiff.training.lora:LoraTask",
        "generated from these captions with the changes, row by row",
        divided=True,
        adapter=True,
    ),
    CONTROL: Row(
        ControlStage,
        section(
            ControlStage,
            "with adapter control: a network that has the model of train.base follow an image",
            batch_size=16,
            lr=2e-4,
            warmup=20,
            ema=0.99,
        ),
        "tinydiff.training.control:ControlTask",
        "control images above, what is drawn with them below",
        ("control images", "drawn"),
        adapter=True,
    ),
    "word": Row(
        WordStage,
        section(
            WordStage,
            "with adapter word: vectors of a new word for what the images show",
            steps=500,
            batch_size=4,
            lr=5e-3,
            warmup=10,
            weight_decay=0.0,
            ema=0.95,
        ),
        "tinydiff.training.word:WordTask",
        "generated from the new word, row by row",
        adapter=True,
    ),
}
NONE = "none"
ADAPTERS = tuple(name for name, row in STAGES.items() if row.adapter)


def possible(train: Any) -> list[str]:
    """The stages that a [train] table may have.

    Of a run that trains an adapter that is this one alone, of one that begins with a model those that go on from it.
    """
    if train.adapter != NONE:
        return [train.adapter]
    return [name for name, row in STAGES.items() if not row.adapter and (row.follows or not train.base)]


def trained(train: Any) -> dict[str, Row]:
    """Those of them that have steps; the others are left out."""
    return {name: STAGES[name] for name in possible(train) if train.stage(name).steps}


def caption(train: Any) -> str:
    """What all images are said to show by a stage that is trained; "" where their own captions are read."""
    return next((text for name in trained(train) if (text := train.stage(name).caption)), "")
