"""What a built-in training asks of a GPU: the arithmetic and traffic of a step, and its memory.

Problem: whether a job fits, and how fast it is, has to be said before it has run. For the built-in
trainers of language models both follow from the model's dimensions and the job's configuration, by
counting. What cannot be counted is not guessed: `read` answers with a sentence.

Arithmetic, for a token: two operations for each parameter forward and four backward, of which the
half for the weights' own gradients is left out where they are frozen; and the attention's own
products, 12 * layers * hidden * window in all (Kaplan et al. 2020, arXiv 2001.08361, 2.1).

Memory: parameters, gradients and AdamW's two moments, in float32, of what is trained; frozen
parameters in what they were opened in; what the layers keep for the backward pass, for a token and
layer 34 times the hidden size in 16 bits without the matrix of the attention, which torch's kernels
do not keep (Korthikanti et al. 2022, arXiv 2205.05198, equation 2), with the MLP's part in
proportion to its width; the logits with their gradient; CUDA itself. Of several ranks each holds
its part of what is kept, and one layer whole at a time.

The defaults are those of `trainers/`, which a coordinator cannot import; a test holds them equal.

"""

import json
import math
from dataclasses import dataclass
from typing import Any

from coordinator.core.model import JobSpec
from coordinator.core.rates import Work

LANGUAGE_TRAINERS = ("finetune", "lora")
HALF = ("bfloat16", "float16")

FLOAT_BYTES = 4
HALF_BYTES = 2
TRAINED_BYTES = 16  # a parameter, its gradient and two moments, in float32
UPDATE_TRAFFIC_BYTES = 28  # of a trained one in an update: four numbers read, three written
# CUDA's context, the workspaces of its libraries, and what an allocator cannot use, as a share.
CONTEXT_BYTES = 800 * 1000**2
FRAGMENTED_RATIO = 1.05
# Of a token's attention, norms and residuals, in elements of the hidden size; and of an MLP for
# each unit of its width, where it is plain and where it is gated.
LAYER_ELEMENTS = 9
MLP_ELEMENTS, MLP_GATED_ELEMENTS = 2, 4
LOGITS_BYTES = 16  # for each: values and gradient, in what the model computes in and in float32
# How long plain PyTorch is busy with the kernels of a layer, forward and backward, and with what is
# left of a step; roughly, and the same for all hosts.
LAYER_LAUNCH_S = 0.0008
STEP_LAUNCH_S = 0.005
PASSES_OVER_ACTIVATIONS = 3  # written once, read twice


# Far above what anybody trains, and far below where arithmetic in floats or on the wire ends.
COUNT_MAX = 10**9
TOKENS_MAX = 10**15
_KINDS = {str: "text", int: "a whole number"}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Dimensions of a language model. `tied`: its last layer is its table of tokens."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    gated: bool = False
    tied: bool = True


@dataclass(frozen=True, slots=True)
class Training:
    """What of a configuration makes a step what it is."""

    trainer: str
    model: str
    steps: int
    batch_size: int = 16
    accumulate: int = 1
    window_tokens: int = 128
    precision: str = "float32"
    base_precision: str = "float32"
    rank: int = 16

    @property
    def half(self) -> bool:
        return self.precision in HALF

    @property
    def samples(self) -> int:
        """Of one step, on all ranks together."""
        return self.batch_size * self.accumulate

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.samples * self.window_tokens

    def at_once(self, ranks: int) -> int:
        """Samples of the largest piece of a rank, as `trainers/microbatch.py` cuts them."""
        return min(self.batch_size, -(-self.samples // ranks))


def read(spec: JobSpec) -> Training | str:
    """The training of a job, or a sentence that says why its work is not known."""
    if not spec.trainer:
        return "a command does not say how much work a step is"
    if spec.trainer not in LANGUAGE_TRAINERS:
        return f"how much work a step of {spec.trainer!r} is depends on its backbone and data"
    try:
        given = json.loads(spec.trainer_config_json or "{}")
    except (ValueError, RecursionError):
        return "the trainer's configuration is no JSON"
    if not isinstance(given, dict):
        return "the trainer's configuration is no table of keys and values"
    kinds: dict[str, Any] = {
        "model": str, "steps": int, "batch_size": int, "accumulate": int, "window_tokens": int,
        "precision": str, "base_precision": str, "rank": int,
    }  # fmt: skip
    known = {name: given[name] for name in kinds if name in given}
    for name, value in known.items():
        if type(value) is not kinds[name]:
            return f"'{name}' of the trainer's configuration must be {_KINDS[kinds[name]]}"
        if kinds[name] is int and not 1 <= value <= COUNT_MAX:
            return f"'{name}' of the trainer's configuration must be from 1 to {COUNT_MAX}"
    for name in ("model", "steps"):
        if name not in known:
            return f"'{name}' is missing in the trainer's configuration"
    training = Training(trainer=spec.trainer, **known)
    if training.steps * training.tokens > TOKENS_MAX:
        return f"the trainer's configuration asks for more than {TOKENS_MAX:.0e} tokens"
    return training


def trained_parameters(training: Training, model: ModelFacts) -> int:
    """All of them, or those of the adapters beside every linear layer but the last."""
    if training.trainer == "finetune":
        return model.parameters
    mlp = 3 if model.gated else 2
    widths = 4 * 2 * model.hidden + mlp * (model.hidden + model.intermediate)
    return training.rank * model.layers * widths


def work(training: Training, model: ModelFacts) -> Work:
    """Of one step, on all ranks together."""
    multiplied = model.parameters - (0 if model.tied else model.vocabulary * model.hidden)
    for_parameter = 6 if training.trainer == "finetune" else 4
    attention = 12 * model.layers * model.hidden * training.window_tokens
    passes = training.accumulate * 2 * model.parameters * _compute_bytes(training)
    kept = _kept_bytes(training, model) * PASSES_OVER_ACTIVATIONS
    traffic = passes + trained_parameters(training, model) * UPDATE_TRAFFIC_BYTES
    return Work(
        flops=training.tokens * (for_parameter * multiplied + attention),
        traffic_bytes=traffic + training.tokens * kept,
        half=training.half,
        launch_s=STEP_LAUNCH_S + training.accumulate * model.layers * LAYER_LAUNCH_S,
    )


def memory_bytes(training: Training, model: ModelFacts, ranks: int, at_once: int) -> int:
    """Of the GPU of one rank, with `at_once` samples in the model."""
    trained = trained_parameters(training, model)
    held = trained * TRAINED_BYTES
    if training.trainer == "finetune" and training.half:
        held += trained * HALF_BYTES  # autocast's copies for a pass
    if training.trainer == "lora":
        frozen = HALF_BYTES if training.base_precision == "bfloat16" else FLOAT_BYTES
        held += model.parameters * frozen
    gathered = 0
    if ranks > 1:
        gathered = 2 * FLOAT_BYTES * model.parameters // max(1, model.layers)
    tokens = at_once * training.window_tokens
    moving = tokens * _kept_bytes(training, model)
    return CONTEXT_BYTES + math.ceil(FRAGMENTED_RATIO * (held / ranks + gathered + moving))


def _compute_bytes(training: Training) -> int:
    return HALF_BYTES if training.half else FLOAT_BYTES


def _kept_bytes(training: Training, model: ModelFacts) -> int:
    """For one token: what all layers keep for the backward pass, and its logits."""
    per_width = MLP_GATED_ELEMENTS if model.gated else MLP_ELEMENTS
    elements = LAYER_ELEMENTS * model.hidden + per_width * model.intermediate
    layers = model.layers * elements * _compute_bytes(training)
    return layers + LOGITS_BYTES * model.vocabulary
