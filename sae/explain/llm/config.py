"""Which language model, how it is called, and what that may cost; standard library only."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from activations_cache.checks import at_least, positive, require

CacheMode = Literal["read-write", "replay", "off"]


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """A chat model behind an OpenAI-compatible endpoint, or one that runs in this process."""

    model: str
    """Name that the endpoint knows; for kind "local" a path as `cache.model.path` takes it."""
    kind: Literal["openai", "local"] = "openai"
    """Where the model runs."""
    constrained: bool = True
    """Whether a local model's numbers are the likeliest allowed ones, and its label what it writes
    behind LABEL:; else it answers freely, and is asked again where it cannot be read."""
    base_url: str | None = None
    """Endpoint such as http://127.0.0.1:8000/v1; OpenAI's own when absent."""
    api_key: Literal["environment", "none"] = "environment"
    """Where the key comes from: OPENAI_API_KEY, or none is sent; a key is never in a config."""
    cache_path: str | None = None
    """SQLite file of all answers; llm.sqlite beside the results when absent."""
    cache_mode: CacheMode = "read-write"
    """With "replay" nothing is called, and an answer that is not there is an error."""
    concurrency: int = 8
    """Calls under way at once."""
    timeout_s: float = 120.0
    """A call that takes longer has failed."""
    retries: int = 6
    """How often a call is made again after a failure of the endpoint."""
    attempts: int = 3
    """How often a question is asked when the answer is refused, cut off or not readable."""
    backoff_s: float = 0.25
    """First pause before a call is made again; it doubles, up to 8 s, and varies by a half."""
    max_wait_s: float = 60.0
    """A longer Retry-After counts as a failure."""
    give_up_after: int = 24
    """So many failed calls one after the other stop the run: the endpoint is down."""
    usd_per_million_input: float = 0.0
    """Price of a million tokens sent."""
    usd_per_million_output: float = 0.0
    """Price of a million tokens received."""
    max_usd: float | None = None
    """No call is begun that could exceed this."""
    max_tokens: int | None = None
    """The same for tokens sent and received."""
    max_requests: int | None = None
    """The same for calls."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        require(bool(self.model), "model", "name a model", self.model)
        for name, least in (("concurrency", 1), ("retries", 0), ("attempts", 1)):
            at_least(name, getattr(self, name), least)
        at_least("give_up_after", self.give_up_after, 1)
        for name in ("timeout_s", "max_wait_s"):
            positive(name, getattr(self, name))
        for name in ("backoff_s", "usd_per_million_input", "usd_per_million_output"):
            at_least(name, getattr(self, name), 0)
        for name in ("max_usd", "max_tokens", "max_requests"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 0)
        has_price = self.usd_per_million_input > 0 or self.usd_per_million_output > 0
        rule = "come with usd_per_million_input or usd_per_million_output"
        require(self.max_usd is None or has_price, "max_usd", rule, self.max_usd)
        if self.base_url is not None:
            url = urlsplit(self.base_url)
            is_plain = url.scheme in ("http", "https") and bool(url.hostname)
            secret = url.username or url.password or url.query
            # The address is written down, so what it holds is not repeated here either.
            rule = "be http(s)://HOST[:PORT]/PATH without a name, password or query"
            require(is_plain and not secret, "base_url", rule, "something else")
