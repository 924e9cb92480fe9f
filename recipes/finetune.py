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
    init_from: str | None = gan.option(None, "run or checkpoint whose weights to start from", bool)

    def __post_init__(self):
        if self.init_from is not None:  # now, since images that take minutes to load come next
            gan.read_checkpoint(gan.find_run(self.init_from, self.runs))


class FineTune(gan.GAN):
    """Takes over weights before its first step; what is saved is a plain GAN, which needs no source to go on."""

    Config = Config

    def __init__(self, config, num_classes=0, device="cpu"):
        super().__init__(config, num_classes, device)
        self.source = config.init_from
        self.config = gan.Config(**{f.name: getattr(config, f.name) for f in fields(gan.Config)})

    def train_step(self, data):
        if self.steps == 0 and self.source:
            self.take_over(gan.find_run(self.source, self.config.runs))
        return super().train_step(data)

    def take_over(self, run):
        """Takes over the weights of a run that fit, and says what share of them do."""
        content = gan.read_checkpoint(run)
        same_classes = self.classes == content["classes"]
        taken = 0
        total = 0
        for part in ("G", "D", "G_ema"):
            state = getattr(self, part).state_dict()  # shares its memory with the network
            for name, tensor in state.items():
                old = content[part].get(name)
                fits = old is not None and old.shape == tensor.shape
                matrix = tensor.numel() if tensor.ndim > 1 else 0  # vectors can fit by chance
                total += matrix
                if fits and (same_classes or "embed" not in name):
                    tensor.copy_(old)
                    taken += matrix

        if taken == 0:
            raise gan.UserError(f"no weights of {run} fit: give its --size, --width, --max-width and --z-dim")
        gan.say(f"{taken / total:.0%} of the weights are those of {run} at step {content['steps']}")


if __name__ == "__main__":
    gan.main(model=FineTune)
