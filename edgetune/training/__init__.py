"""Training: the loop on the torch engine, and what every engine's loop shares, which imports no torch.

shared      inputs, batches, schedule, trainer, stop, pace, progress, run
torch       loop, torch_trainer, rules and one file per step rule, and what these compute with
"""
