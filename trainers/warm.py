"""What a process imports that trainers are forked from, so that none of them waits for it again.

Problem: torch, transformers and the classes of a model take seconds to import, which after a
handoff are seconds of an idle GPU. Forking from a process that has done it costs milliseconds, but
only if that process has computed nothing: a forked copy of an OpenMP or CUDA runtime that has
worked hangs. So this module imports, and that is all; whoever forks makes sure by counting threads.
"""

import transformers
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, ViTModel

from trainers import adapters, causal, checkpoint, classify, loop, models

MODULES = (adapters, causal, checkpoint, classify, loop, models)
"""Those of ours that import slowly; the ones that are run (``finetune``, ``lora``...) do not."""

CLASSES = (AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, ViTModel)
"""transformers imports a model's code at its first mention. Others are imported when needed."""

VERSION = transformers.__version__
