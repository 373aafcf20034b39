"""Evaluations that end early, and the networks that they train."""

from atom_fast.evaluation import accuracy as evaluation
from atom_fast.training.trainer import Trainer


def interrupted_after(finished, monkeypatch):
    """Stop evaluations as by Ctrl-C when so many networks have been recorded."""
    written, write = [], evaluation.write_record

    def stopping(path, record):
        write(path, record)
        written.append(record)
        if len(written) == finished:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "write_record", stopping)


def count_trained(monkeypatch):
    """Return the list to which the seed of every network that is trained is added."""
    seeds, restart = [], Trainer.restart
    monkeypatch.setattr(Trainer, "restart", lambda trainer, seed: (seed and seeds.append(seed), restart(trainer, seed)))
    return seeds
