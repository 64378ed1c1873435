"""From a request's tokens to the chunks its reader gets, alike on every engine."""

from __future__ import annotations

from minicpm_edge.engines.base import Chunk, FinishReason, GenerationRequest, Model
from minicpm_edge.text.detokenizer import IncrementalDetokenizer


class ChunkBuilder:
    """Takes the tokens of one request and tells where its text ends: stop token, stop string, budget or context."""

    def __init__(self, model: Model, request: GenerationRequest) -> None:
        params, room = request.params, model.context_length - len(request.prompt_ids)
        self._model = model
        self._num_prompt_tokens = len(request.prompt_ids)
        self._budget = min(params.max_tokens or room, room)
        self._text = IncrementalDetokenizer(params.stop)
        self._count = 0

    def push(self, token: int) -> Chunk | None:
        """The chunk that ``token`` completes, the last if it has a finish reason; None while its text is held back."""
        self._count += 1
        finish: FinishReason | None = None
        if token in self._model.stop_token_ids:
            piece, finish = self._text.finish(), "stop"
        else:
            piece = self._text.push(self._model.vocabulary.token_bytes(token))
            if self._text.stopped:
                finish = "stop"
            elif self._count == self._budget:
                piece, finish = piece + self._text.finish(cut=True), "length"
        if not piece and not finish:
            return None
        return Chunk(
            text=piece,
            finish_reason=finish,
            num_prompt_tokens=self._num_prompt_tokens,
            num_completion_tokens=self._count,
        )
