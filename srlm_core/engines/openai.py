"""Any OpenAI-compatible endpoint as an engine: a frozen judge on a server, or a model behind a provider.

Each sample is a request of its own: its seed and its token count are then exact, and servers that ignore `n` work too.
Only `generate` and `token_scores`: the protocol of endpoints has no probability of a given response in a conversation.
"""

import json
import os
import queue
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from srlm_core.config import EngineConfig
from srlm_core.engines.protocol import Completion, LogProb, Missing, Request, Reward, ScoredText, TokenScores
from srlm_core.errors import ConfigError, EngineDied, ModelError

if TYPE_CHECKING:
    from openai import OpenAI

_RETRIES = 6
"""The client waits twice as long before each, up to 8 s, or as long as the server says."""
_TRIES = 3
"""How often one thing is asked where the answer cannot be used: no JSON, no choices, no text."""
_TOP = (20, 5)
"""Most likely tokens asked for; some servers allow only 5."""
_NO_ANSWER = "filtered"
_TOO_LONG = re.compile(
    r"context.?length|context window|maximum.{0,20}(context|tokens|input)|too long|too many tokens", re.IGNORECASE
)


class OpenAIEngine:
    """Speaks the engine protocol for an endpoint, with up to `max_in_flight` requests at once."""

    kind = "openai"

    def __init__(self, config: EngineConfig, model: Path) -> None:
        if not config.base_url:
            raise ConfigError(
                "engine.base_url: expected the endpoint's address with engine.kind='openai', got none. "
                "Such as http://127.0.0.1:8000/v1."
            )
        self.url, self.model, self.context = config.base_url, str(model), config.context
        self.capabilities = frozenset({"generate", "token_scores"})
        self._key_env, self._in_flight = config.api_key_env, config.max_in_flight
        self._client: OpenAI | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._limit = "max_tokens"

    def __enter__(self) -> Self:
        """Connect, and find out whether the endpoint gives log-probabilities. Raises EngineDied or ModelError."""
        from openai import OpenAI, Timeout

        self._client = OpenAI(
            base_url=self.url, api_key=os.environ.get(self._key_env) or "EMPTY", max_retries=_RETRIES,
            timeout=Timeout(600.0, connect=10.0),
        )  # fmt: skip
        try:
            self._greet()
        except BaseException:
            self._client.close()
            raise
        self._pool = ThreadPoolExecutor(self._in_flight, thread_name_prefix="endpoint")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._client is not None:
            self._client.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        samples = ((request, index) for request in requests for index in range(request.n))
        return self._each(samples, lambda sample: self._complete(*sample))

    def token_scores(self, requests: Iterable[Request], choices: Sequence[str]) -> Iterator[TokenScores]:
        """As in the protocol, but a choice outside the endpoint's list of most likely tokens gets -inf.

        That list has 20 tokens, or 5. Null where no choice is in it.
        """
        if "token_scores" not in self.capabilities:
            raise ModelError(
                f"expected log-probabilities from {self.url}, which gives none. "
                "Set judgments.reading='text', or run the judge locally."
            )
        return self._each(requests, lambda request: self._scores(request, tuple(choices)))

    def logprobs(self, rows: Iterable[ScoredText]) -> Iterator[LogProb]:
        raise ModelError(
            f"expected an engine that weighs given responses, got the endpoint {self.url}. "
            "Run that model locally for this."
        )

    def rewards(self, rows: Iterable[ScoredText]) -> Iterator[Reward]:
        raise ModelError(f"expected a reward model, got the endpoint {self.url}. Name its folder or hub id.")

    # -------------------------------------------------------------------------------------------- one request each

    def _complete(self, request: Request, index: int) -> Completion:
        asked = request.sampling
        drawing: dict[str, Any] = {
            "temperature": asked.temperature, "top_p": asked.top_p, "seed": request.seed + index,
            "stop": list(asked.stop) or None,
        }  # fmt: skip
        answer, missing = self._usable(request, asked.max_tokens, drawing)
        if missing:
            return Completion(request.id, index, "", 0, missing)
        choice = answer.choices[0]
        text = (choice.message.content if request.messages else choice.text) or ""
        # An endpoint that cannot continue a turn may say its beginning again
        text = text.removeprefix(request.prefix) if request.messages and request.prefix else text
        n_tokens = answer.usage.completion_tokens if answer.usage else 0
        return Completion(request.id, index, text, n_tokens, "length" if choice.finish_reason == "length" else "stop")

    def _scores(self, request: Request, choices: tuple[str, ...]) -> TokenScores:
        found, missing = self._top(request, request.prefix)
        shared = os.path.commonprefix(choices)  # noqa: RUF071 - of characters is what is meant
        if found is not None and not any(choice in found for choice in choices) and shared:
            # Some tokenizers make ` 3` a space and a digit: then the digit is asked for after the space
            found, missing = self._top(request, request.prefix + shared)
            found = found and {shared + token: value for token, value in found.items()}
        if found is None or not any(choice in found for choice in choices):
            return TokenScores(request.id, None, missing or "no_choice")
        return TokenScores(request.id, tuple(found.get(choice, float("-inf")) for choice in choices))

    def _top(self, request: Request, prefix: str) -> tuple[dict[str, float] | None, Missing | None]:
        """Return the most likely next tokens with their log-probabilities, or why there are none."""
        asked = Request(request.id, request.messages, prefix)
        for n in _TOP:
            wanted = {"logprobs": True, "top_logprobs": n} if request.messages else {"logprobs": n}
            try:
                answer, missing = self._usable(asked, 1, {"temperature": 1.0, "top_p": 1.0, **wanted})
            except ModelError:
                if n == _TOP[-1]:
                    raise
                continue
            return (None, missing) if missing else (_top_of(answer.choices[0], chat=bool(request.messages)), None)
        return None, "failed"

    def _usable(self, request: Request, max_tokens: int, more: dict[str, Any]) -> tuple[Any, Missing | None]:
        """Ask until the answer can be used, or say why there is none. What is no answer is not taken for one."""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(2.0 ** (attempt - 2))
            try:
                answer = self._ask(request, max_tokens, more)
            except json.JSONDecodeError:
                continue
            if answer is None:
                return None, "too_long"
            choice = next(iter(getattr(answer, "choices", None) or ()), None)
            if answer is _NO_ANSWER or getattr(choice, "finish_reason", None) == "content_filter":
                return None, "failed"  # and will be, however often it is asked
            if getattr(choice, "message" if request.messages else "text", None) is not None:
                return answer, None
        return None, "failed"

    def _ask(self, request: Request, max_tokens: int, more: dict[str, Any]) -> Any:
        """Send one request; returns null if the endpoint says that it is too long. Retries are the client's."""
        from openai import APIConnectionError, APIStatusError, BadRequestError

        assert self._client is not None
        try:
            return self._send(self._client, request, max_tokens, more)
        except BadRequestError as error:
            if self._limit == "max_tokens" and "max_completion_tokens" in str(error):
                self._limit = "max_completion_tokens"  # newer models of OpenAI's own know the limit by this name alone
                return self._ask(request, max_tokens, more)
            if _TOO_LONG.search(str(error)):
                return None
            if error.code == "content_filter":
                return _NO_ANSWER
            self._refused(error)
        except APIStatusError as error:
            self._refused(error)
        except APIConnectionError as error:
            raise self._unreachable(error) from error

    def _send(self, client: "OpenAI", request: Request, max_tokens: int, more: dict[str, Any]) -> Any:
        if not request.messages:
            return client.completions.create(model=self.model, prompt=request.prefix, max_tokens=max_tokens, **more)
        messages: list[Any] = list(request.messages)
        extra: dict[str, Any] = {}
        if request.prefix:
            messages.append({"role": "assistant", "content": request.prefix})
            extra = {"continue_final_message": True, "add_generation_prompt": False}
        return client.chat.completions.create(
            model=self.model, messages=messages, extra_body=extra or None, **{self._limit: max_tokens}, **more
        )

    # ------------------------------------------------------------------------------------------------------ around

    def _greet(self) -> None:
        from openai import APIConnectionError, APIStatusError, NotFoundError

        assert self._client is not None
        try:
            known = [model.id for model in self._client.with_options(max_retries=1).models.list()]
        except NotFoundError:
            known = []  # not every server lists its models
        except APIStatusError as error:
            self._refused(error)
        except APIConnectionError as error:
            raise self._unreachable(error) from error
        if known and self.model not in known:
            raise ModelError(
                f"expected {self.url} to serve {self.model!r}, it serves {', '.join(known[:8])}. Name one of these."
            )
        probe = Request("probe", ({"role": "user", "content": "Say one digit."},))
        try:
            heard, _ = self._top(probe, "")
        except ModelError:
            heard = None
        if not heard:
            self.capabilities = frozenset({"generate"})

    def _each(self, items: Iterable[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
        """Do the work for each item in the pool and yield results as they come; pulls twice what is in flight."""
        if self._pool is None:
            raise EngineDied(f"{self.url}: expected a connection, got none: enter the engine first.")
        done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        running: set[Future[Any]] = set()
        feed = iter(items)
        try:
            while True:
                while len(running) < 2 * self._in_flight and (item := next(feed, None)) is not None:
                    future = self._pool.submit(work, item)
                    running.add(future)
                    future.add_done_callback(done.put)
                if not running:
                    return
                future = done.get()
                running.discard(future)
                yield future.result()
        finally:
            for future in running:
                future.cancel()

    def _refused(self, error: Any) -> NoReturn:
        reason = str(error)[:300]
        if error.status_code in (401, 403):
            raise ModelError(
                f"{self.url}: expected access, got: {reason}. "
                f"Put the key into the environment variable {self._key_env}."
            ) from error
        if error.status_code == 429 or error.status_code >= 500:
            raise EngineDied(
                f"{self.url}: expected an answer within {_RETRIES} retries, got: {reason}. "
                "Lower engine.max_in_flight, or try later."
            ) from error
        raise ModelError(f"{self.url}: expected an answer of {self.model!r}, got: {reason}.") from error

    def _unreachable(self, error: Exception) -> EngineDied:
        reason = error.__cause__ or error
        return EngineDied(
            f"{self.url}: expected an OpenAI-compatible endpoint, got: {reason}. Start it, or mend its address."
        )


def _top_of(choice: Any, *, chat: bool) -> dict[str, float]:
    if choice.logprobs is None:
        return {}
    if chat:
        first = (choice.logprobs.content or [None])[0]
        return {} if first is None else {token.token: token.logprob for token in first.top_logprobs}
    return dict((choice.logprobs.top_logprobs or [{}])[0] or {})
