# SPDX-License-Identifier: MIT
"""Loads a run, draws samples and saves them: a start for a program of your own.

    python recipes/example.py [RUN [CLASS...]]

Writes example.png. RUN is a folder or its name in runs, by default the newest; classes are names or numbers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan

run = gan.find_run(*sys.argv[1:2])
classes = sys.argv[2:] or None  # all

# The averaged generator of a run, for noise that is bounded by 1.5.
G, config = gan.load_generator(run, trunc=1.5)
print(f"{config.data} at step {G.steps}")

# 16 samples, uint8 [16,C,H,W] from 0 to 255, of the classes in turn.
images = gan.generate(G, 16, classes, seed=0)

# One picture of them, four in a row.
sheet = gan.tile(images, columns=4)
gan.write_picture("example.png", sheet, gan.SHEET)

# Or by hand: z and the number of a class give an image [1,C,H,W] in [-1,1].
z = gan.sample_z(1, G.z_dim, G.trunc)
y = gan.choose_classes(G, 1)
x = G(z, y)
print(tuple(x.shape))
