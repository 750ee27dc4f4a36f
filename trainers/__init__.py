"""The built-in trainers: ordinary programs that train on ordinary data and survive a handoff.

``transfer`` puts a new head on a frozen backbone, ``finetune`` trains all layers of a causal
language model, ``lora`` small adapters in it. Each is a model and its data under the one ``loop``,
whose whole state ``checkpoint`` turns into files and back. Nothing here knows the agent or the
coordinator: the loop speaks to whoever started it through ``baton_sdk`` alone.
"""
