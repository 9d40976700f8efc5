"""A reward of one's own that also pays for the format: --reward forks/format_bonus.py:format_bonus

It wants a boxed answer, and golds in the column `answer`.
"""

from support.answers import answers_match
from templates import last_boxed

BONUS = 0.1  # well below 1: a wrong answer in the right format must not be worth much


def format_bonus(response: str, row: dict) -> float:
    """1 for a right answer, and BONUS for a response that has one box and ends in it."""
    answer = last_boxed(response)
    if answer is None:
        return 0.0
    reward = 1.0 if answers_match(answer, row["answer"]) else 0.0
    if response.count("\\boxed") == 1 and response.rstrip().endswith(f"{{{answer}}}"):
        reward += BONUS
    return reward
