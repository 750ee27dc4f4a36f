"""How a Hugging Face `Trainer` script becomes a Baton job with no line of it changed.

Problem: a script that knows nothing of Baton is started again from nothing whenever its node dies,
and asking people to change scripts that work is how such systems stay unused. A wrapper program
(`baton-run train.py`) would have to be repeated in every launcher; a patched transformers would
have to be repeated for every release.

How: the agent puts the directory `path/` in front of PYTHONPATH. Python imports `sitecustomize`
from there before the program's first line; that module leaves one finder in `sys.meta_path`, calls
the environment's own `sitecustomize`, and is done. Nothing more happens until something imports
`transformers.trainer`. Then `trainer.install` wraps one public method, `Trainer.train`:

1. before it, `resume.choose` decides what to resume from: the script's own checkpoint, or the last
   committed one if that is newer; `torn` moves aside what a crash left half written, and where
   there are several ranks they agree on one step (`agreement`);
2. during it, a `TrainerCallback` reports progress, hands over every checkpoint that the script
   saves, of several ranks what each has written (`states`, `shards`), and answers a stop request
   with a save and the end of the training;
3. after a stop, when the agent has the checkpoint, the program leaves with status 75.

Nothing here imports torch or transformers: they are the program's, and what is needed of them is
reached through the module that the program has imported. Nothing here unpickles anything, either;
`optimizer.pt`, `scheduler.pt` and `rng_state.pth` are Hugging Face's own files in torch's own
format, and only transformers reads them, as it would without us.

Whatever goes wrong in here is one line on stderr, and the program goes on as if it had been
started without (`guard`). BATON_HOOK=0 in a job's environment switches all of it off.

Source: "The sitecustomize module" in the documentation of Python's `site`.
"""
