"""The routes of OpenAI's API and vLLM's on one model."""

from __future__ import annotations

from fastapi import APIRouter

from engine.server.chat import chat_route
from engine.server.completions import completions_route
from engine.server.models_route import models_route
from engine.server.served_model import ServedModel
from engine.server.submits import Submits
from engine.server.tokenize_route import tokenize_route


def openai_routes(model: ServedModel, engine: Submits) -> APIRouter:
    """Completions, chats, models and tokens: all that the protocol has."""
    router = APIRouter()
    router.include_router(completions_route(model, engine))
    router.include_router(chat_route(model, engine))
    router.include_router(models_route(model))
    router.include_router(tokenize_route(model))
    return router
