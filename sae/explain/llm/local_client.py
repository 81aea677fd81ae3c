"""A language model in this process as a client; it also gives likelihoods and embeddings.

A local model whose answers cannot be misread: likeliest allowed numbers, prefilled labels.

A small model seldom keeps to a form, and guessing what it meant would make answers up. Here the
form is ours and only the choice is the model's: each number of a list is the allowed one that is
likeliest at its place, given those before it; a label is what the model writes behind our own
`LABEL:`, up to the end of the line. Whether the answers are worth anything is for the scores.
"""

import hashlib
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from activations_cache.reading import given_cache
from sae.explain.judges import allowed, read_question
from sae.explain.llm.chat import AnswerToken, CallFailedError, Message, Request, Response


@runtime_checkable
class LocalModel(Protocol):
    """What `activations_cache.load_model` returns."""

    @property
    def model(self) -> nn.Module:
        """A causal language model with `generate`."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of weights and tokenizer."""
        ...


class LocalClient:
    """Answers by a model of transformers' interface, on its own device, one request at a time."""

    def __init__(self, loaded: LocalModel, title: str) -> None:
        """Keep the model.

        Args:
            loaded: Model and tokenizer.
            title: What it is called; a hash of its identity is added.
        """
        self._model: Any = loaded.model
        self._tokenizer = loaded.tokenizer
        digest = hashlib.sha256(repr(sorted(loaded.identity.items())).encode()).hexdigest()
        self.name = f"local {title} {digest[:12]}"
        """Title and identity of the model."""

    async def complete(self, request: Request) -> Response:
        """Answer one request; the event loop waits.

        Raises:
            CallFailedError: If the prompt is longer than what the model can read.
        """
        ids = self._ids(request.messages)
        longest = getattr(self._model.config, "max_position_embeddings", None)
        if longest and ids.shape[1] + request.max_tokens > longest:
            detail = f"{ids.shape[1]} tokens and an answer do not fit into {longest} positions"
            raise CallFailedError("context", detail)
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature}
        with self._seeded_locally(), torch.no_grad():
            torch.manual_seed(request.seed)
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.max_tokens,
                pad_token_id=self._tokenizer.eos_token_id,
                **sampling,
            )[0, ids.shape[1] :]
        ended = len(out) < request.max_tokens or int(out[-1]) == self._tokenizer.eos_token_id
        text = self._tokenizer.decode(out, skip_special_tokens=True)
        return Response(text, "stop" if ended else "length", ids.shape[1], len(out))

    def log_likelihood(self, prefix: str, text: str) -> float:
        """Mean log probability of the text's tokens after the prefix, in nats."""
        before = self._plain(prefix)
        ids = torch.cat([before, self._plain(text)], dim=1)
        with torch.no_grad():
            logits = self._model(ids).logits[0, :-1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return float(chosen[max(before.shape[1] - 1, 0) :].mean())

    def embed(self, texts: list[str]) -> Float[Tensor, "batch d_model"]:
        """Mean of the last hidden states of each text: a weak embedding, but at hand."""
        rows = []
        for text in texts:
            with torch.no_grad():
                states = self._model(self._plain(text), output_hidden_states=True).hidden_states
            rows.append(states[-1][0].float().mean(dim=0))
        return torch.stack(rows)

    def _seeded_locally(self) -> AbstractContextManager[None]:
        """Random numbers of this answer's own, on the model's device as well."""
        device = self._model.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def _plain(self, text: str) -> Tensor:
        ids = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return ids.to(self._model.device)

    def _ids(self, messages: tuple[Message, ...]) -> Tensor:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        if getattr(self._tokenizer, "chat_template", None):
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        else:  # a base model: plain turns
            text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            text += "\n\nassistant:"
        return self._plain(text)


_LABEL = "LABEL:"
_LABEL_TOKENS = 32
_LARGEST = 9
"""Numbers of one digit, which are one token everywhere; a larger range is cut to it."""


class ConstrainedClient(LocalClient):
    """A local client that answers the explainers' and scorers' questions in their form."""

    def __init__(self, loaded: LocalModel, title: str) -> None:
        """Keep the model; see `LocalClient`."""
        super().__init__(loaded, title)
        self.name += " constrained/1"
        self._digits = [self._plain(str(n))[0, -1] for n in range(_LARGEST + 1)]

    async def complete(self, request: Request) -> Response:
        """Answer one request; questions of another kind are answered freely."""
        task, _, items = read_question(request)
        if task.startswith("explain"):
            return self._label(request)
        known = allowed(task, len(items))
        if known is None:
            return await super().complete(request)
        n, low, high = known
        return self._numbers(request, n, low, min(high, _LARGEST))

    @torch.no_grad()
    def _numbers(self, request: Request, n: int, low: int, high: int) -> Response:
        ids = self._fitting(request, "[", 3 * n)
        n_read = ids.shape[1]
        choices = torch.stack(self._digits[low : high + 1])
        cache: dict[str, Any] = {}
        numbers: list[int] = []
        tokens: list[AnswerToken] = []
        for _ in range(n):
            out = self._model(ids, use_cache=True, **cache)
            cache = given_cache(self._model, out)
            logprobs = out.logits[0, -1, choices].float().log_softmax(dim=0)
            numbers.append(low + int(logprobs.argmax()))
            # With what stands around it a digit cannot begin a larger number.
            form = f"{' ' if tokens else '['}{{}}{']' if len(numbers) == n else ','}"
            some = ((form.format(low + i), p) for i, p in enumerate(logprobs.tolist()))
            tokens.append(AnswerToken(form.format(numbers[-1]), tuple(some)))
            more = self._plain(f"{numbers[-1]}, ")
            ids = more if cache else torch.cat([ids, more], dim=1)
        asked = tuple(tokens) if request.alternatives else ()
        return Response(str(numbers), "stop", n_read, 3 * n, asked)

    @torch.no_grad()
    def _label(self, request: Request) -> Response:
        ids = self._fitting(request, _LABEL, _LABEL_TOKENS)
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature}
        with self._seeded_locally():
            torch.manual_seed(request.seed)
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_LABEL_TOKENS,
                pad_token_id=self._tokenizer.eos_token_id,
                **sampling,
            )[0, ids.shape[1] :]
        text = self._tokenizer.decode(out, skip_special_tokens=True).strip()
        line = text.splitlines()[0] if text else ""
        return Response(f"{_LABEL} {line}", "stop", ids.shape[1], len(out))

    def _fitting(self, request: Request, begin: str, n_more: int) -> Tensor:
        """The prompt with the beginning of the answer.

        Raises:
            CallFailedError: If it is longer than what the model can read.
        """
        ids = torch.cat([self._ids(request.messages), self._plain(begin)], dim=1)
        longest = getattr(self._model.config, "max_position_embeddings", None)
        if longest and ids.shape[1] + n_more > longest:
            detail = f"{ids.shape[1]} tokens and an answer do not fit into {longest} positions"
            raise CallFailedError("context", detail)
        return ids
