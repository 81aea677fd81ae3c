"""How latents of texts and images are explained; standard library only."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from monosema.checks import LATER, all_at_least, at_least, formerly, positive, require

WordMethod = Literal["clip_dissect", "text_direction", "splice"]
"""What makes labels of words: soft-WPMI, the nearest text of a latent's images, or SpLiCE."""

Method = Literal["enrichment", "soft_wpmi"] | WordMethod
"""What makes the labels: Fisher's test of classes and groups, soft-WPMI over the classes, words."""


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Labels that are words, through towers for texts and images that embed into one space."""

    tower: str
    """CLIP or SigLIP: a directory or hub id."""
    revision: str | None = None
    """Commit, tag or branch; only for a hub id."""
    concepts: str | None = None
    """A .txt with a word or caption a line, or .jsonl, .parquet; the folders' names when absent."""
    field: str = "text"
    """Of a record."""
    templates: tuple[str, ...] = ("{}",)
    """Texts with one {} each, such as "a photo of a {}"; the mean of the embeddings counts."""
    method: WordMethod = "clip_dissect"
    """What makes the labels; the others are scored beside it, SpLiCE only where it is named."""
    share: float = 0.1
    """An image counts as having a word if it is in this share of the images likeliest to."""
    penalty: float = 0.25
    """SpLiCE's on the weights: larger makes them sparser."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        for name in ("tower", "field"):
            require(bool(getattr(self, name)), name, "not be empty", getattr(self, name))
        is_form = bool(self.templates) and all(t.count("{}") == 1 for t in self.templates)
        require(is_form, "templates", "be texts with one {} each", self.templates)
        require(0 < self.share <= 0.5, "share", "lie above 0 and be at most 0.5", self.share)
        positive("penalty", self.penalty)


@dataclass(frozen=True, kw_only=True)
class ImageLabelConfig:
    """Labels from the classes of images, or words, and their scores on other images."""

    words: WordsConfig | None = field(default=None, metadata=LATER)
    """Words of a text tower instead of classes; `method`, groups and `max_p` are not read then."""
    captions: str | None = field(default=None, metadata=LATER)
    """Records (.jsonl) with `image` and `text`: words of captions or reports instead of classes."""
    method: Literal["enrichment", "soft_wpmi"] = "enrichment"
    """What makes the labels of classes; the other one's score is reported beside it."""
    group_separator: str | None = None
    """Classes that share what stands before it also make a group, such as "-" in animals-birds."""
    min_images: int = 5
    """A latent that fires on fewer images of either split is "insufficient"."""
    max_p: float = 0.05
    """A class less certain than this on the explain split, all classes allowed for, is no label."""
    permutations: int = 999
    """Permuted copies of the score split's classes that show what chance gives."""
    top_images: int = 8
    """Images kept per latent, by their largest activation."""
    images_per_fifth: int = field(default=1, metadata=formerly("bucket_images"))
    """Further images of each fifth of a latent's activations, from 0 to its largest."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        all_at_least(self, min_images=2, permutations=99, top_images=1, images_per_fifth=0)
        require(0 < self.max_p <= 1, "max_p", "lie above 0 and be at most 1", self.max_p)
        separator = self.group_separator
        require(separator != "", "group_separator", "not be empty", separator)
        unread = {"group_separator": None}
        if self.words:
            unread |= {"method": "enrichment", "max_p": 0.05, "captions": None}
        for name, default in unread.items() if self.by_words else ():
            what, value = "words" if self.words else "captions", getattr(self, name)
            require(value == default, name, f"be absent where images.{what} is given", value)

    @property
    def by_words(self) -> bool:
        """Whether labels are words, so that images need no classes."""
        return self.words is not None or self.captions is not None


CacheMode = Literal["read-write", "replay", "off"]
ServiceKind = Literal["openai", "openrouter", "mistral", "vllm", "llama.cpp", "ollama", "local"]


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """A chat model behind an OpenAI-compatible endpoint, or one that runs in this process."""

    model: str
    """Name that the endpoint knows; for kind "local" a path as `cache.model.path` takes it."""
    kind: ServiceKind = "openai"
    """Which kind of service, with a preset of its address and fields (`llm/form.py`): "openai" and
    all that imitate it, a server of one's own, or "local", `transformers` in this process."""
    constrained: bool = True
    """Whether a local model's numbers are the likeliest allowed ones, and its label what it writes
    behind LABEL:; else it answers freely, and is asked again where it cannot be read."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of a local model; "auto": bfloat16 on a GPU, float32 without one."""
    base_url: str | None = None
    """Endpoint such as http://127.0.0.1:8000/v1; the usual one of its kind when absent."""
    api_key: Literal["auto", "environment", "none"] = "auto"
    """Where the key comes from: OPENAI_API_KEY, or none is sent, as is usual for a server of one's
    own; a key is never in a config."""
    answer_tokens: int | None = None
    """Longest answer, thoughts included; what each question needs when absent."""
    longest_answer: int = 16384
    """An answer that was cut is asked for again with more room, up to this."""
    length_field: Literal["auto", "max_tokens", "max_completion_tokens", "none"] = "auto"
    """What the service calls the longest answer; "auto": as its kind does, else what it takes."""
    leave_out: tuple[str, ...] = ()
    """Fields that are not sent, such as "temperature"; what is refused is left out too."""
    reasoning_effort: str | None = None
    """How long a thinking model thinks, such as "low"; not sent when absent."""
    response_format: Literal["auto", "json_schema", "none"] = "auto"
    """Whether the server holds answers to a JSON schema: those of one's own do."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields, such as {"chat_template_kwargs": {"enable_thinking": false}}."""
    batch_dir: str | None = None
    """Questions are written to batch files here, and answers read, instead of calling."""
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
    """First pause before a call is made again; it doubles, up to 8 s, and varies by a half. A busy
    service (429, 503) is waited out by all calls: 8 times as long, up to 60 s, or what it asks."""
    max_wait_s: float = 600.0
    """A busy service that asks for more stops the run, as do `retries` waits without an answer."""
    give_up_after: int = 24
    """So many failed calls one after the other stop the run: the endpoint is down."""
    stop_after_refusals: int = 10
    """So many equal refusals of a kind of question before its first answer stop the run."""
    max_answer_bytes: int = 4_000_000
    """A longer body of an answer is not read."""
    usd_per_million_input: float = 0.0
    """Price of a million tokens sent."""
    usd_per_million_output: float = 0.0
    """Price of a million tokens received."""
    max_usd: float | None = None
    """No call is begun that could exceed this, counted over all runs that use the same store."""
    max_tokens: int | None = None
    """The same for tokens sent and received."""
    max_requests: int | None = None
    """The same for calls."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        require(bool(self.model), "model", "name a model", self.model)
        all_at_least(
            self, concurrency=1, retries=0, attempts=1, give_up_after=1, stop_after_refusals=1,
            longest_answer=1, max_answer_bytes=1000,
        )  # fmt: skip
        if self.answer_tokens is not None:
            at_least("answer_tokens", self.answer_tokens, 1)
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
        is_live = self.batch_dir is None or (self.kind != "local" and self.cache_mode != "off")
        rule = "be absent for a model in this process and where no answers are kept"
        require(is_live, "batch_dir", rule, self.batch_dir)


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How examples are cut into windows, and how many of which kind are kept in each split."""

    tokens: int = 32
    """Tokens of a window; 0 takes whole examples, as for images."""
    n_top: int = 10
    """Windows with the largest peaks."""
    n_steps: int = field(default=5, metadata=formerly("n_buckets"))
    """Equal steps of activation from 0 to the latent's maximum."""
    per_step: int = field(default=4, metadata=formerly("per_bucket"))
    """Windows taken at random from each step."""
    weak_share: float = 0.1
    """A window whose peak is at most this share of the maximum is weakly active, not active."""
    n_negatives: int = 10
    """Windows of each of the four sources of negatives."""
    pool: int = 2048
    """Random windows of each split, kept with all their activations, to take negatives from."""
    n_neighbours: int = 8
    """Latents that fire together with each one most, by Jaccard's index."""
    rows_per_chunk: int = 8192
    """Rows encoded at once, rounded up to whole examples."""
    save_every: int = 64
    """Chunks between two saved states, from which an interrupted pass goes on."""
    seed: int = 0
    """Seed of the hash that decides what is kept."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        all_at_least(
            self, tokens=0, n_top=0, per_step=0, n_negatives=0, n_neighbours=0, n_steps=1, pool=1,
            rows_per_chunk=1, save_every=1, seed=0,
        )  # fmt: skip
        require(0 <= self.weak_share < 1, "weak_share", "lie in [0, 1)", self.weak_share)


Kind = Literal["word", "previous word", "word pair", "token", "supersense", "source", "position"]
"""What a label may speak of: one property of the text at a row."""

ALL_KINDS: tuple[Kind, ...] = get_args(Kind)
"""All kinds; where two explain a latent about equally well, the first of them is taken."""

KINDS: tuple[Kind, ...] = tuple([kind for kind in ALL_KINDS if kind != "word pair"])
"""Those that compete unless others are named: pairs win on the explain split by their number and
lose on other documents (mean AUC 0.682 with them, 0.684 without, on the demo's TopK)."""

Style = Literal["levels", "bills", "delphi"]
"""How contexts are shown to an explainer."""

ScorerName = Literal[
    "detection", "fuzzing", "simulation", "rubric", "intruder",
    "embedding", "surprisal", "output side", "sensitivity", "ablation",
]  # fmt: skip
"""What scores labels: the first five by asking, the others by the model that is explained."""


@dataclass(frozen=True, kw_only=True)
class AutointerpConfig:
    """Labels by a language model, and what checks them."""

    llm: LLMConfig
    """The model, and what it may cost."""
    windows: WindowConfig = field(default_factory=WindowConfig)
    """What is collected of every latent."""
    style: Style = "levels"
    """How contexts are shown to the explainer."""
    contrastive: bool = False
    """Whether it also sees windows in which the latent is silent."""
    logit_lens: bool = False
    """Whether it also sees the tokens that the latent promotes and suppresses."""
    scorers: tuple[ScorerName, ...] = ("detection", "fuzzing")
    """What scores the labels."""
    n_latents: int = 100
    """Live latents that are explained, taken by a hash."""
    latents: tuple[int, ...] = ()
    """These latents instead."""
    min_windows: int = 8
    """Fewer active windows in either split: the latent is "insufficient"."""
    n_controls: int = 20
    """Latents that are also scored with another's label and on shuffled windows."""
    n_baseline: int = 10
    """Random directions, and as many raw neurons, that are explained and scored beside them."""
    neuronpedia_model: str = ""
    """Neuronpedia's name of the model; with it, files for Neuronpedia are written too."""
    neuronpedia_layer: str = "sae"
    """Its name of the dictionary."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        all_at_least(self, n_latents=1, min_windows=1, n_controls=0, n_baseline=0)
        is_set = 0 < len(self.scorers) == len(set(self.scorers))
        require(is_set, "scorers", "be one or more scorers, each once", self.scorers)
        is_list = len(self.latents) == len(set(self.latents)) and min(self.latents, default=0) >= 0
        require(is_list, "latents", "be numbers of latents, each once", self.latents)
        for name in ("neuronpedia_model", "neuronpedia_layer"):
            value, rule = getattr(self, name), "be letters, digits, '-', '_' and '.'"
            is_name = re.fullmatch(r"[\w.-]*", value) and ".." not in value
            require(bool(is_name), name, rule, value)


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """Scores of the labels without a language model by executing them on windows."""

    n_latents: int = 100
    """Live latents, taken by a hash; 0 collects windows and scores none."""
    scorers: tuple[ScorerName, ...] = ("detection", "fuzzing", "simulation", "rubric", "intruder")
    """What scores them."""
    min_windows: int = 8
    """Fewer active windows in either split: the latent is "insufficient"."""
    windows: WindowConfig = field(default_factory=WindowConfig)
    """What is collected of every latent."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        all_at_least(self, n_latents=0, min_windows=1)
        is_set = 0 < len(self.scorers) == len(set(self.scorers))
        require(is_set, "scorers", "be one or more scorers, each once", self.scorers)


@dataclass(frozen=True, kw_only=True)
class AtlasConfig:
    """The map of a dictionary."""

    plane: Literal["tsne", "pca", "umap"] = "tsne"
    """How directions become two coordinates; UMAP needs monosema[umap]."""
    n_neighbours: int = 8
    """Closest latents by decoder cosine that are written for each one."""
    n_rows: int = 8192
    """Rows over which latents are correlated with the coordinates of the stream."""
    n_concepts: int = 2000
    """Concepts for the curve of completeness, evenly over the logarithm of their frequency."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        all_at_least(self, n_neighbours=1, n_rows=2, n_concepts=10)


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Labels from corpus statistics and their scores on other documents."""

    kinds: tuple[Kind, ...] = KINDS
    """The properties of the text that compete for a latent's label."""
    min_firings: int = 20
    """Fewer firing rows than this in either split: the latent is "insufficient"."""
    min_examples: int = 5
    """The same for examples in which it fires: an interval over so few examples means nothing."""
    words_per_label: int = 5
    """Most words, tokens, supersenses, ... that a label lists."""
    wide_words: int = 50
    """Words of the larger rule, whose score is reported beside the label's as `auc_wide`."""
    min_word_count: int = 5
    """Rarer words, in rows of the explain split, are not considered."""
    prior_rows: float = 5.0
    """Shrinkage of p(fires | word): pseudo-rows that fire at the latent's own rate."""
    permutations: int = 4
    """Permuted copies of the text that show what chance gives; few latents get more of them."""
    null_permutations: int = 99
    """Permuted copies of the unseen documents that a label's score is compared with."""
    n_baseline: int = 128
    """Random directions, and as many raw neurons, that are labelled and scored the same way."""
    top_contexts: int = 5
    """Contexts kept per latent, from different examples, by peak activation."""
    contexts_per_fifth: int = field(default=2, metadata=formerly("bucket_contexts"))
    """Further contexts from each fifth of a latent's activations, spread evenly over it."""
    context_tokens: int = 32
    """Tokens of a kept context, around its peak."""
    histogram_bins: int = 20
    """Equal steps from 0 to the largest activation in a latent's histogram."""
    seed: int = 0
    """Seed of the permutations, of the control arm's pairing and of the bootstrap."""
    images: ImageLabelConfig = field(default_factory=ImageLabelConfig)
    """Labels where the cache is of images; what is of text above is not read then."""
    weights: int = field(default=0, metadata=LATER)
    """Labels from the weights as well, of so many of the text's most frequent words; 0: none."""
    rules: RuleConfig | None = None
    """Windows of every latent, and the labels executed on them; neither when absent."""
    atlas: AtlasConfig | None = None
    """The map as well; none when absent."""
    autointerp: AutointerpConfig | None = None
    """Labels by a language model as well; none when absent."""

    def __post_init__(self) -> None:
        """Check every field; ValueError names the first that is wrong."""
        all_at_least(
            self, min_firings=2, min_examples=2, words_per_label=1, min_word_count=1,
            permutations=2, null_permutations=1, n_baseline=0, top_contexts=1,
            contexts_per_fifth=0, context_tokens=1, histogram_bins=1, seed=0, weights=0,
        )  # fmt: skip
        is_wide = self.words_per_label <= self.wide_words <= 255
        rule = f"lie between words_per_label={self.words_per_label} and 255"
        require(is_wide, "wide_words", rule, self.wide_words)
        is_positive = math.isfinite(self.prior_rows) and self.prior_rows > 0
        require(is_positive, "prior_rows", "be a positive number", self.prior_rows)
        is_set = 0 < len(self.kinds) == len(set(self.kinds)) and set(self.kinds) <= set(ALL_KINDS)
        require(is_set, "kinds", f"be one or more of {ALL_KINDS}, each once", self.kinds)
