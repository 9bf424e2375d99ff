"""Prompts as texts: ShareGPT JSON, vLLM's custom JSONL and OpenAI batch JSONL.

None of these has arrival times: every row arrives at 0 until a rate is imposed. Lengths are
estimated from the texts until a tokenizer counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from autotune.workload.fields import Fields, encodable
from autotune.workload.rows import WorkloadRow
from autotune.workload.source import Source

# A common rule of thumb for English text; it only stands in for the tokenizer's count.
CHARACTERS_PER_TOKEN = 4
_HUMAN = ("human", "user")
_CUSTOM_OUTPUT = ("output_tokens", "output_len", "max_tokens")
_BATCH_OUTPUT = ("max_completion_tokens", "max_output_tokens", "max_tokens")


def read_sharegpt(source: Source, notes: Counter[str]) -> Iterator[WorkloadRow]:
    """The first question and answer of each conversation, as vLLM takes them, unfiltered."""
    for fields in source.json_elements():
        turns = fields.array("conversations")
        texts = [_turn(fields, turn) for turn in turns]
        asked = next((i for i, (who, text) in enumerate(texts) if who in _HUMAN and text), None)
        answer = texts[asked + 1] if asked is not None and asked + 1 < len(texts) else None
        if asked is None or answer is None or answer[0] in _HUMAN or not answer[1]:
            notes["conversations without a question and its answer were left out"] += 1
            continue
        yield text_row(texts[asked][1], completion=answer[1])


def read_custom(
    source: Source, notes: Counter[str], default_output_tokens: int
) -> Iterator[WorkloadRow]:
    """vLLM's custom data set: `prompt` and maybe `output_tokens`, or `prompt_token_ids`."""
    for fields in source.json_lines():
        name = fields.first_of(_CUSTOM_OUTPUT)
        output = fields.tokens(name) if name else None
        completion = fields.text("completion") if "completion" in fields else None
        if output is None and completion is None:
            output = default_output_tokens
            notes[f"rows without output_tokens get {output}"] += 1
        session = fields.label("session_id")
        if "prompt_token_ids" in fields:
            ids = fields.token_ids("prompt_token_ids")
            length = output or _estimate(completion or "")
            yield WorkloadRow(0.0, len(ids), length, token_ids=ids, session_id=session)
        else:
            yield text_row(fields.text("prompt"), output, completion, session)


def read_openai_batch(
    source: Source, notes: Counter[str], default_output_tokens: int
) -> Iterator[WorkloadRow]:
    """Requests of an OpenAI batch file, or the token counts of its results."""
    for fields in source.json_lines():
        if "response" in fields:
            row = _batch_result(fields)
            if row is None:
                notes["failed requests of the batch were left out"] += 1
            else:
                yield row
            continue
        body = fields.object("body")
        name = body.first_of(_BATCH_OUTPUT)
        output = body.tokens(name) if name else default_output_tokens
        if name is None:
            notes[f"rows without max_completion_tokens get {output} output tokens"] += 1
        yield text_row(_batch_prompt(fields, body), output)


def text_row(
    prompt: str,
    output_tokens: int | None = None,
    completion: str | None = None,
    session_id: str | None = None,
) -> WorkloadRow:
    """A row whose lengths are estimates where only texts are known."""
    if output_tokens is None:
        output_tokens = _estimate(completion or "")
    else:
        completion = None
    return WorkloadRow(
        0.0,
        _estimate(prompt),
        output_tokens,
        prompt=encodable(prompt),
        session_id=session_id,
        completion=None if completion is None else encodable(completion),
    )


def _estimate(text: str) -> int:
    return max(1, len(text) // CHARACTERS_PER_TOKEN)


def _turn(fields: Fields, turn: object) -> tuple[str, str]:
    if not isinstance(turn, dict):
        fields.fail("conversations", 'must hold objects with "from" and "value"')
    who = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    if not isinstance(who, str) or not isinstance(text, str):
        fields.fail("conversations", 'must hold objects with the texts "from" and "value"')
    return who, text


def _batch_prompt(fields: Fields, body: Fields) -> str:
    if "messages" in body:
        messages = body.array("messages")
        if not messages:
            body.fail("messages", "is empty; it must hold at least one message")
        return "\n".join(_message(body, message) for message in messages)
    name = body.first_of(("prompt", "input"))
    if name is None:
        fields.fail("body", "has neither messages nor prompt nor input; it must have one of them")
    return body.text(name)


def _message(body: Fields, message: object) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        body.fail("messages", "must hold objects with role and content")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            body.fail("messages", "has content beside text; only text can be replayed")
        content = "".join(str(part) for part in parts)
    # An assistant's turn that only calls tools has null content.
    if content is not None and not isinstance(content, str):
        body.fail("messages", "has content that is no text; it must be one")
    return f"{message['role']}: {content or ''}"


def _batch_result(fields: Fields) -> WorkloadRow | None:
    response = fields.object("response")
    if "error" in fields or response.values.get("status_code", 200) != 200:
        return None
    # Older results hold the completion itself where newer ones hold status_code and body.
    body = response.object("body") if "body" in response else response
    usage = body.object("usage")
    output = usage.tokens("completion_tokens", minimum=0)
    return WorkloadRow(0.0, usage.tokens("prompt_tokens"), output) if output else None
