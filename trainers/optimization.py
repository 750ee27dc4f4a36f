"""From gradients to parameters: the optimizer, its learning rate, and 16-bit arithmetic.

Problem: half precision doubles the speed of matrix products and has two costs. bfloat16 keeps the
range of float32 with 8 bits of precision, so it needs nothing else. float16 keeps 11 bits, but its
smallest number is 6e-8, and gradients smaller than that vanish: so the loss is multiplied by a
scale before ``backward``, and the gradients divided by it after (Micikevicius et al., "Mixed
Precision Training", 2018). The scale falls when a gradient overflows, and that step is left out; it
rises again after many good ones. It decides how training goes on, so every checkpoint has it.

Of several ranks one alone may find the overflow, in its rows of a gradient, and a step that only
the others take is the end of a common model. torch agrees on it where gradients are spread: its
check for what is not finite is a collective there, the most that any rank has found. So the ranks
take or leave each step together, and their scales stay equal.

Parameters and the optimizer's state are float32 throughout. The learning rate is a function of the
step and has no state.
"""

import math

import torch

from trainers import sharding
from trainers.configuration import LoopOptions
from trainers.ranks import ALONE, World

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""What matrix products are computed in, where it is not float32."""


def learning_rate_at(step: int, options: LoopOptions) -> float:
    """The rate for the step that makes ``step`` steps complete (1 to ``options.steps``)."""
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    if options.schedule == "constant":
        return options.learning_rate
    done_ratio = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    if options.schedule == "linear":
        return options.learning_rate * (1 - done_ratio)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done_ratio))


def make_optimizer(model: torch.nn.Module, options: LoopOptions) -> torch.optim.Optimizer:
    """AdamW; weights decay, biases and norms (fewer than two dimensions) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=options.learning_rate)


def autocast(device: torch.device, options: LoopOptions) -> torch.autocast:
    """The context in which the model computes."""
    dtype = AUTOCAST.get(options.precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def make_scaler(device: torch.device, options: LoopOptions) -> torch.amp.GradScaler:
    """The scale of the loss; with anything but float16 it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=options.precision == "float16")


def update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    options: LoopOptions,
    world: World = ALONE,
) -> None:
    """Clip the gradients that stand in the parameters, by the norm of all of them, and take the
    step."""
    if options.clip_norm > 0:
        scaler.unscale_(optimizer)
        parameters = [p for p in model.parameters() if p.grad is not None]
        own = torch.nn.utils.get_total_norm([sharding.local(p.grad) for p in parameters])
        torch.nn.utils.clip_grads_with_norm_(parameters, options.clip_norm, world.norm(own))
    scaler.step(optimizer)
    scaler.update()
