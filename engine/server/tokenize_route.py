"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import json

from fastapi import APIRouter, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from engine.server.answers import READS, documented
from engine.server.body import read_body
from engine.server.prompts import check_token_ids, conversation_ids, encode
from engine.server.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from engine.server.responses import DetokenizedText, Tokens
from engine.server.served_model import ServedModel

_TEXT = TypeAdapter(TokenizeRequest | TokenizeChatRequest)
_TOKENS = TypeAdapter(DetokenizeRequest)


def tokenize_route(model: ServedModel) -> APIRouter:
    """The routes on one model."""
    router = APIRouter()

    @router.post(
        "/tokenize",
        operation_id="tokenize",
        summary="The tokens of a text or a conversation",
        response_model=None,
        **documented((TokenizeRequest, TokenizeChatRequest), Tokens, errors=READS),
    )
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, _TEXT)
        model.check_name(body.model)
        tokenizer = model.needs_tokenizer()
        if isinstance(body, TokenizeRequest):
            special = body.add_special_tokens is not False
            (ids,) = await encode(tokenizer, [body.prompt], add_special_tokens=special)
        else:
            ids = await conversation_ids(body, model)
        spelled = [tokenizer.piece(i) for i in ids] if body.return_token_strs else None
        return _json(
            {
                "count": len(ids),
                "max_model_len": model.max_model_len,
                "tokens": ids,
                "token_strs": spelled,
            }
        )

    @router.post(
        "/detokenize",
        operation_id="detokenize",
        summary="The text of tokens",
        response_model=None,
        **documented(DetokenizeRequest, DetokenizedText, errors=READS),
    )
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, _TOKENS)
        model.check_name(body.model)
        check_token_ids(body.tokens, model)
        text = model.needs_tokenizer().decode(body.tokens, skip_special_tokens=False)
        return _json({"prompt": text})

    return router


def _json(value: object) -> Response:
    return Response(json.dumps(value), media_type="application/json")
