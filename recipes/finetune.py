# SPDX-License-Identifier: MIT
"""Starts from the weights of another run: a small data set profits from what a large one taught.

    python recipes/finetune.py train --init-from runs/0000-rpgan-cond-FOLDER-64 --data FEW --loss rpgan --cond

Takes over every tensor of G, D and the average whose name and shape fit; embeddings only if the classes are the same.
Everything else is as in gan.py, with new optimizers; `gan.py eval` and `sample` take the run like any other.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan


@dataclass
class Config(gan.Config):
    init_from: str | None = gan.option(None, "run or checkpoint whose weights to start from")


class FineTune(gan.GAN):
    Config = Config

    def __init__(self, config, num_classes=0, device="cpu"):
        super().__init__(config, num_classes, device)
        self.source = config.init_from and gan.find_run(config.init_from, config.runs)
        # What is saved is a plain GAN, to which eval, sample and --resume need no source.
        self.config = gan.Config(**{f.name: getattr(config, f.name) for f in fields(gan.Config)})

    def train_step(self, data):
        if self.steps == 0 and self.source:
            self.take_over(self.source)
        return super().train_step(data)

    def take_over(self, run):
        """Takes over the weights of a run that fit, and says what share of them fit."""
        content, taken, total = gan.read_checkpoint(run, type(self)), 0, 0
        for net, old in ((getattr(self, name), content[name]) for name in ("G", "D", "G_ema")):
            new, same = net.state_dict(), self.classes == content["classes"]
            fit = {k: old[k] for k in new if k in old and old[k].shape == new[k].shape and (same or "embed" not in k)}
            net.load_state_dict(new | fit)
            taken, total = taken + sum(t.numel() for t in fit.values()), total + sum(t.numel() for t in new.values())
        if not taken:
            raise gan.UserError(f"no weights of {run} fit: give its --size, --width, --max-width and --z-dim")
        gan.say(f"{taken / total:.0%} of the weights are those of {run} at step {content['steps']}")


if __name__ == "__main__":
    gan.main(model=FineTune)
