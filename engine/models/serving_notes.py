"""What a user should know of how a model is served here, in sentences."""

from __future__ import annotations

from engine.models.spec import DecoderSpec


def serving_notes(spec: DecoderSpec, max_model_len: int) -> list[str]:
    """Sentences on where this engine does less or other than the model's card says.

    `max_model_len` is the longest sequence of the engine in tokens.
    """
    notes = []
    if spec.text_only:
        notes.append(f"{spec.architecture} is served for text only: images are not understood")
    original = spec.rope.original_max_position
    if spec.rope.kind == "longrope" and max_model_len > original:
        notes.append(
            f"sequences may have more than {original} tokens, so that short ones too are computed "
            f"with LongRoPE's long factors, as vLLM does: set max_model_len to at most {original} "
            "if none is longer"
        )
    return notes
