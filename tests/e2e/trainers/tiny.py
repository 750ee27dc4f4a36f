"""Models and data so small that a test can train them twice.

Both models have dropout, because a training without random numbers would resume exactly also when
the state of their generators was lost. The text and the images are made from a seed.
"""

import random
import string
from pathlib import Path

import numpy
import torch
import transformers

SEED = 11
WORDS, TEXT_WORDS = 300, 6_000
IMAGES, PIXELS, CLASSES = 96, 8, 4


def language_model(directory: Path) -> None:
    """A GPT-2 over bytes, and a text of made-up words."""
    configuration = transformers.GPT2Config(
        vocab_size=256, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(configuration).save_pretrained(directory / "language")
    chance = random.Random(SEED)
    words = [
        "".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 9)))
        for _ in range(WORDS)
    ]
    text = " ".join(chance.choices(words, k=TEXT_WORDS))
    (directory / "text.txt").write_text(text, "ascii")


def classifier(directory: Path) -> None:
    """A vision transformer, and images whose class is where they are bright."""
    configuration = transformers.ViTConfig(
        image_size=PIXELS, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=0.1,
    )  # fmt: skip
    transformers.ViTModel(configuration).save_pretrained(directory / "vision")
    generator = numpy.random.default_rng(SEED)
    labels = generator.integers(0, CLASSES, IMAGES)
    images = generator.integers(0, 128, (IMAGES, PIXELS, PIXELS))
    for image, label in zip(images, labels, strict=True):
        image[label * 2 : label * 2 + 2] += 100
    numpy.savez(directory / "images.npz", x=images.astype(numpy.uint8), y=labels)


def make(directory: Path) -> None:
    """Both of them. The caller's random numbers are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        language_model(directory)
        classifier(directory)
