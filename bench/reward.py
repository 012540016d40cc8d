"""The reward of `bench rl` and of its peer: it differs between responses and costs nothing."""


def reward(response: str, row: dict) -> float:
    """Share of the even tokens of a response; token i is written "w<i>"."""
    tokens = [int(word[1:]) for word in response.split() if word[1:].isdigit()]
    return sum(token % 2 == 0 for token in tokens) / max(1, len(tokens))
