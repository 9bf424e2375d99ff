"""Tokens that a request cost, as OpenAI's API counts them."""

from __future__ import annotations

from collections.abc import Sequence

from engine.output import RequestOutput


class Usage:
    """Counts tokens of a request's prompts and outputs.

    Args:
        prompt_tokens: of each prompt.
        num_choices: outputs of each prompt; output i belongs to prompt i // num_choices.

    A prompt is counted once, however many outputs it has; cached are those of its tokens that its
    first output found in the prefix cache.
    """

    def __init__(self, prompt_tokens: Sequence[int], num_choices: int = 1) -> None:
        self._num_choices = num_choices
        self._prompt_tokens = sum(prompt_tokens)
        self._cached = [0] * len(prompt_tokens)
        self._completion_tokens = 0

    def count(self, choice: int, output: RequestOutput) -> None:
        """Take an output in."""
        self._completion_tokens += len(output.token_ids)
        prompt, number = divmod(choice, self._num_choices)
        if number == 0:
            self._cached[prompt] = output.request.num_cached_tokens

    def json(self) -> str:
        """The object `usage` as JSON."""
        prompt, completion = self._prompt_tokens, self._completion_tokens
        return (
            f'{{"prompt_tokens":{prompt},"completion_tokens":{completion},'
            f'"total_tokens":{prompt + completion},'
            f'"prompt_tokens_details":{{"cached_tokens":{sum(self._cached)}}}}}'
        )
