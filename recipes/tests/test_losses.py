# SPDX-License-Identifier: MIT
import pytest

import losses

NAMES = {"cross-entropy": "minimax", "non-saturating": "ns", "MSE": "lsgan"}


@pytest.mark.parametrize("d_steps, end", [(1, ""), (5, ", 5 steps of D")])
@pytest.mark.parametrize("name", NAMES)
def test_variants_are_what_their_titles_say(name, d_steps, end):
    """By definition: each loss with one and with five steps of D, and as many of G."""
    config = losses.STUDY.config(name + end)
    assert (config.loss, config.d_steps) == (NAMES[name], d_steps)
    assert (config.g_steps, config.steps) == (1, losses.STUDY.steps)
