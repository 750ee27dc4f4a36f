"""What needs a card: a script for each question, and ``python -m bench.gpu`` for all of them.

For a person who has a machine with a CUDA device for half an hour. In this order, so that what is
worth most comes first; each script also runs alone:

    make setup                       beforehand, where there is a network: torch is gigabytes
    make gpu                         all of the following: python -m bench.gpu
      python -m bench.gpu.card       which card, driver and torch; or why torch sees none
      python -m pytest -m gpu tests  whether it is right: races, captures, resumes, the real NVML
      python -m bench.gpu.prefetch   what a step costs more than its computation; the way out
      python -m bench.gpu.checkpoint what a step loses to a checkpoint, and when it is durable
      make demo                      three agents share the card, and a node dies

Where nothing can be installed, any Python that has torch, rich and nvidia-ml-py runs the card and
prefetch scripts (``python3 -m bench.gpu --only prefetch``); the others want what pyproject.toml
names, and say what they miss. ``--only`` also parts the half hour where a command may not last it.

Nothing of it takes ten minutes. What was found is in ``.bench/gpu.md``, a section that can be put
into docs/benchmarks.md as it is, written anew after each script; what each has said, in files
beside it.
"""

EXIT_NO_DEVICE = 3
