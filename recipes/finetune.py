# SPDX-License-Identifier: MIT
"""Starts from the weights of another run: a new data set of few images gains what a large one has taught.

    python recipes/finetune.py train --init-from runs/0000-rpgan-cond-FOLDER-64 --data FEW --loss rpgan --cond

Takes over every tensor of G, D and the average whose name and shape fit; embeddings only if the classes are the same.
Everything else is as in gan.py, with new optimizers.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan


@dataclass
class Config(gan.Config):
    init_from: str | None = gan.option(None, "run or checkpoint whose weights to start from")


class FineTune(gan.GAN):
    Config = Config

    def train_step(self, data):
        if self.steps == 0 and self.config.init_from:  # not when the run is resumed
            self.take_over(gan.find_run(self.config.init_from, self.config.runs))
        return super().train_step(data)

    def take_over(self, run):
        """Takes over the weights of a run that fit, and says which share of them does."""
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
