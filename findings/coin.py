"""A reward that knows nothing: `--reward findings/coin.py:coin`. See random_reward.py.

It stands alone, and imports little, because each grading process loads it.
"""

import hashlib


def coin(response: str, row: dict) -> float:
    """1 or 0 with equal chances, whatever the response says.

    The coin is a hash of problem and response, not a draw: the grader grades equal responses to a
    problem once, and a run with the same seed must be the same run again. The problem's answer is
    not in the hash, so the coin cannot know it.
    """
    text = f"{row['problem']}\0{response}"
    return float(hashlib.sha256(text.encode()).digest()[0] % 2)
