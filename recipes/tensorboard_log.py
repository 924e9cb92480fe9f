# SPDX-License-Identifier: MIT
"""Writes what a run logs and draws as TensorBoard events; its name is not tensorboard.py, which would hide the package.

python recipes/tensorboard_log.py train --loss rpgan --data FOLDER    # flags, eval and sample: as with gan.py
tensorboard --logdir runs
"""

import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan


class Logged(gan.GAN):
    """Writes each line of the log, and a grid of samples with each checkpoint, into the run's folder tensorboard."""

    writer = None

    def open_writer(self, run):
        """Returns the run's writer; a resumed run hides what an earlier process wrote of the steps that it repeats."""
        if self.writer is None:
            self.writer = SummaryWriter(run / "tensorboard", purge_step=self.steps)
        return self.writer

    def after_log(self, run, record):
        for name, value in record.items():
            self.open_writer(run).add_scalar(name, value, self.steps)

    def after_save(self, run):
        grid = gan.sample_grid(gan.standing_generator(self.G_ema))  # uint8 [3,H,W]
        self.open_writer(run).add_image("samples", grid, self.steps)
        self.writer.flush()


if __name__ == "__main__":
    gan.main(model=Logged)
