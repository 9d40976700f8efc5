"""A reward that knows nothing, for a control with any model and any data:

    python drgrpo.py PRESET --reward findings/coin.py:coin --truncated-reward 0.5

A response that is cut off gets the coin's mean, 0.5: with the preset's 0 the reward would know
something, to stop in time. See random_reward.py. This file imports little, because each grading
process loads it.
"""

import hashlib
import json


def coin(response: str, row: dict) -> float:
    """1 or 0 with equal chances, whatever the response says. `row` may have any columns.

    The coin is a hash of row and response, not a draw: the grader grades equal responses to a
    problem once, and a run with the same seed must be the same run again.
    """
    text = json.dumps([row, response], sort_keys=True, default=str)
    return float(hashlib.sha256(text.encode()).digest()[0] % 2)
