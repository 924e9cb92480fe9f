# SPDX-License-Identifier: MIT
"""Which loss, and how many steps of D for one of G? Cross-entropy, its non-saturating form and MSE on MNIST.

    python recipes/losses.py study --seeds 3 --extractor digits.pt2    # digits.pt2 is made by classifier.py

Cross-entropy is gan.py's `minimax --no-center`: G minimises log(1 - D), which is flat where D is sure of its fakes. The
non-saturating form, `ns`, minimises -log D instead, which is steepest there (both arXiv 1406.2661). MSE is `lsgan`
(1611.04076). The networks are DCGAN's, whose D can win; spectral norm mostly keeps gan.py's own D from that on digits.
All runs have as many steps of G, so five steps of D for each of G take about three times as long.
Takes the study of dcgan.py.
"""

from dataclasses import replace

import dcgan

VARIANTS = {
    "cross-entropy": "minimax",
    "non-saturating": "ns",
    "MSE": "lsgan",
    "cross-entropy, 5 steps of D": "minimax --d-steps 5",
    "non-saturating, 5 steps of D": "ns --d-steps 5",
    "MSE, 5 steps of D": "lsgan --d-steps 5",
}
STUDY = replace(
    dcgan.STUDY,
    name="losses",
    steps=1000,
    flags="--size 16 --ngf 32 --ndf 32 --sample-every 1000",
    variants=VARIANTS,
)

if __name__ == "__main__":
    STUDY.run()
