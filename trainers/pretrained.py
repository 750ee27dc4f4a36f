"""What the demonstration jobs begin with: two small models, pre-trained in seconds, and their data.

Problem: a demonstration of transfer needs something pre-trained, and a fresh machine without a
network has nothing. So it is made of data that ordinary packages bring. Here is what needs torch;
`prepare.py` says what there is to make, and asks for this only when something is missing.
"""

import contextlib
import io
import sysconfig
from pathlib import Path

import numpy
import torch
import transformers

import baton_sdk
from trainers import data, loop
from trainers.causal import BYTE_VALUES, CausalTextTask
from trainers.classify import Classifier, ClassifyTask, make_head
from trainers.configuration import LoopOptions
from trainers.prepare import PIXEL_MAX, say

LICENCES = Path("/usr/share/common-licenses")
"""Where Debian and Ubuntu keep the texts that their packages refer to."""

CORPUS_BYTES = 6_000_000
"""Of the standard library: more than pre-training gets to see in its seconds."""

LICENCE_BYTES_MAX = 400_000
"""Enough for a job of a minute; a system with many packages has far more."""

DIGIT_PRETRAIN, DIGIT_LABELLED = 1000, 40
"""Of 1797 images: these many pre-train, the next 40 train the head, the other 757 evaluate."""


def digits(directory: Path) -> None:
    """A ViT pre-trained on ten classes, and 40 + 757 labelled images for odd against even."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = numpy.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].reshape(-1, 8, 8).astype(numpy.uint8), labels[order]
    end = DIGIT_PRETRAIN + DIGIT_LABELLED
    for name, part in (("train", slice(DIGIT_PRETRAIN, end)), ("evaluation", slice(end, None))):
        parity = numpy.where(labels[part] % 2, "odd", "even")
        numpy.savez(directory / f"{name}.npz", x=images[part], y=parity)
    loop.seed_everything(0)
    configuration = transformers.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=128, hidden_dropout_prob=0.0,
    )  # fmt: skip
    backbone = transformers.ViTModel(configuration)
    pixels = torch.from_numpy(images / PIXEL_MAX).float().unsqueeze(1)
    targets = torch.from_numpy(labels)
    task = ClassifyTask(
        Classifier(backbone, make_head(64, 0, 10), frozen=False),
        ({"pixel_values": pixels[:DIGIT_PRETRAIN]}, targets[:DIGIT_PRETRAIN]),
        ({"pixel_values": pixels[end:]}, targets[end:]),
        identity="pre-training on digits",
    )
    pretrain(task, LoopOptions(steps=500, batch_size=32, learning_rate=2e-3, warmup_steps=20))
    backbone.save_pretrained(directory / "backbone")


def text(directory: Path) -> None:
    """A byte-level GPT-2 pre-trained on Python sources, and a folder of licence texts."""
    corpus = licences()
    (directory / "licences").mkdir()
    for name, content in corpus.items():
        (directory / "licences" / f"{name}.txt").write_text(content, encoding="utf-8")
    loop.seed_everything(0)
    configuration = transformers.GPT2Config(
        vocab_size=BYTE_VALUES, n_positions=128, n_embd=128, n_layer=3, n_head=4,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(configuration)
    tokens = torch.frombuffer(bytearray(standard_library()), dtype=torch.uint8)
    windows = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    task = CausalTextTask(
        model, windows[:-64], windows[-64:], bytes_per_token=1.0, identity="pre-training on text"
    )
    pretrain(task, LoopOptions(steps=150, batch_size=8, learning_rate=3e-3, warmup_steps=20))
    model.save_pretrained(directory / "model")


def pretrain(task: loop.Task, options: LoopOptions) -> None:
    """Train without an agent and without a log; say what came out."""
    torch.set_num_threads(1)  # on batches this small more threads only wait for one another
    # The evaluation is at the end only, and the lines of the loop are not for this command.
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = loop.Trainer(task, options, baton_sdk.Session({}))
        trainer.run()
    say(f"  pre-trained: {task.metric} {trainer.metrics[task.metric]:.3f} on held-out data")


def standard_library() -> bytes:
    """Sources of Python's standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    content = b""
    for file in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        if "site-packages" not in file.parts:
            content += file.read_bytes()
        if len(content) > CORPUS_BYTES:
            break
    return content[:CORPUS_BYTES]


def licences() -> dict[str, str]:
    """Licence texts by name: the system's, or where it has none those of installed packages."""
    if LICENCES.is_dir():
        files = {file.name: file for file in sorted(LICENCES.iterdir()) if file.is_file()}
    else:
        packages = Path(sysconfig.get_path("purelib"))
        files = {
            f"{file.relative_to(packages).parts[0]}-{file.name}": file
            for file in sorted(packages.glob("*.dist-info/**/*LICEN[SC]E*"))
            if file.is_file()
        }
    corpus: dict[str, str] = {}
    seen: set[str] = set()
    for name, file in files.items():
        content = file.read_text(encoding="utf-8", errors="replace")
        digest = data.digest_of(content.encode())
        total_bytes = sum(len(other) for other in corpus.values())
        if digest not in seen and total_bytes < LICENCE_BYTES_MAX:
            corpus[name] = content
        seen.add(digest)
    return corpus
