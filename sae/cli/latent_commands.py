"""The commands about latents: `sae explain`, `find`, `steer`, `browse` and `refine`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae.cli import console
from sae.cli.request import (
    ForceOption,
    Overrides,
    ReadOutOption,
    of_run,
    refuse_without_cache,
    run_to,
)
from sae.config import ConfigError, is_config, load_overrides
from sae.explain.config import ExplainConfig
from sae.run.config import BottleneckRequest, ConceptsRequest, browsed_config
from sae.steer.config import FindRequest, SteerRequest, SteerWordsRequest

if TYPE_CHECKING:
    from sae.browser.server import PromptView


def browse(  # noqa: PLR0913
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG|DICT",
            help="A run's directory, a YAML file, a recipe, or a labelled dictionary.",
        ),
    ],
    out: Annotated[str | None, typer.Option(help="Folder to write; RUN/browse.")] = None,
    cache: Annotated[str | None, typer.Option(help="DICT: the cache it was explained on.")] = None,
    force: ForceOption = False,
    read_out: ReadOutOption = "linear",
    serve: Annotated[bool, typer.Option("--serve", help="Show it on a local address.")] = False,
    host: Annotated[str, typer.Option(help="Of the server; others need --token.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the server; 0 takes a free one.")
    ] = 8765,
    token: Annotated[str | None, typer.Option(help="What a reader must know.")] = None,
) -> None:
    """Write the feature browser of a run as a folder of pages that opens by double click.

    Of a config every step before it is made sure of, as `sae run` does. With --serve the same
    folder is shown on a local address, where texts can be read with the model as well.
    """
    config = browsed_config(run)
    is_yaml = is_config(run)
    if is_yaml:
        run_to("browse", run, of_run(read_out))
    from sae.run.browsing import INDEX, browser_folder, write_browser

    folder = browser_folder(run, config, out)
    is_there = is_yaml or (serve and (folder / INDEX).is_file())
    if out or not is_there:
        with console.step("browse") as progress:
            write_browser(run, config, folder, cache, progress, force=force, read_out=read_out)
        console.say(f"page: {(folder / INDEX).resolve()}")
    if serve:
        from sae.run.page import prompt_view

        _serve(folder, (host, port, token), prompt_view(config))


def _serve(
    folder: Path, address: tuple[str, int, str | None], prompts: "PromptView | None"
) -> None:
    """Answer until Ctrl-C."""
    from sae.browser.server import BrowserServer

    host, port, token = address
    try:
        server = BrowserServer(folder, host, port, token=token, prompts=prompts)
    except OSError as error:
        raise OSError(
            f"--port must be free on {host}, got {port}: {error.strerror}; name another one"
        ) from error
    with server:
        console.OUT.print(f"browser: {server.url}  (Ctrl-C ends it)", soft_wrap=True, markup=False)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.OUT.print("ended")


def explain(  # noqa: PLR0913
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|DICT", help="A YAML file, a recipe; with --cache a dictionary."
        ),
    ],
    overrides: Overrides = None,
    cache: Annotated[str | None, typer.Option(help="Explain DICT on this cache.")] = None,
    hook_point: Annotated[
        str | None, typer.Option(help="Of the cache, where DICT names none.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Result directory; DICT/explain.")] = None,
    across: Annotated[
        str | None, typer.Option(help="A narrower dictionary: which latents did it split?")
    ] = None,
    max_usd: Annotated[float | None, typer.Option(help="A model's answers cost no more.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The same in tokens.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate a model's answers, ask nothing.")
    ] = False,
    force: ForceOption = False,
    read_out: ReadOutOption = "linear",
) -> None:
    """Label latents and score the labels: those of a run, or with --cache of any dictionary.

    With --cache the overrides are those of `explain:`, such as min_firings=50, of images
    images.group_separator=-. Latents of images are labelled by the folders of the images, or by
    words: images.words.tower=CLIP_DIR images.words.concepts=words.txt.

    Labels by a language model: autointerp.llm.model=NAME, with autointerp.llm.kind=openai,
    openrouter, mistral, vllm, llama.cpp, ollama or local, autointerp.llm.base_url=URL for another
    address, autointerp.llm.batch_dir=DIR for batch files. Exit code 1 while questions are open: the
    same command asks just those. Limits count all runs with the same llm.sqlite.
    """
    limits = {"max_usd": max_usd, "max_tokens": max_tokens}
    given = [f"autointerp.llm.{key}={value}" for key, value in limits.items() if value is not None]
    if cache is None:
        alone = {"--out": out, "--hook-point": hook_point, "--across": across}
        alone |= {"--dry-run": dry_run, "--force": force}
        wrong = next((name for name, value in alone.items() if value), "")
        if wrong:
            raise ConfigError(f"{wrong} must come with --cache CACHE, got none")
        refuse_without_cache(config)
        given = [f"explain.{key}" for key in given]
        run_to("explain", config, [*(overrides or []), *given, *of_run(read_out)])
        return
    checked = load_overrides(ExplainConfig, [*(overrides or []), *given])
    if dry_run and checked.autointerp is None:
        raise ConfigError("--dry-run must come with autointerp.llm.model=NAME, got none")
    from sae.run.explaining import ExplainRequest, estimate, explain_dictionary
    from sae.run.label_tables import estimate_facts, explanation_parts

    request = ExplainRequest(config, cache, hook_point, out, across, force, read_out)
    if dry_run and checked.autointerp is not None:
        with console.step("estimate") as progress:
            cost = estimate(request, checked, progress)
        console.facts(estimate_facts(config, cost, checked.autointerp))
        return
    console.parts(explanation_parts(config, explain_dictionary(request, checked, console.step)))


def steer(  # noqa: PLR0913  (options are parameters)
    path: Annotated[
        str, typer.Argument(metavar="CONFIG|DICT", help="A YAML file, a recipe, or a dictionary.")
    ],
    overrides: Overrides = None,
    latent: Annotated[
        list[str] | None, typer.Option(help="NUMBER=CHANGE: 123=10x, =+2x, =*3, =off; repeatable.")
    ] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(help="All latents whose labels name it; repeatable."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What is continued, or a picture; repeatable.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="If the dictionary does not name it.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are what a user says: use the chat template.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try many strengths and plot them.")
    ] = False,
    output: Annotated[str | None, typer.Option(help="Directory of a sweep's results.")] = None,
    force: ForceOption = False,
    read_out: ReadOutOption = "linear",
) -> None:
    """Generate with latents changed: of a run's config after explaining, or of a dictionary.

    A dictionary takes KEY=VALUE too: positions=generated max_new_tokens=60 strengths=[1,2,4]
    unit=norm max_kl=0.3 neutral=news.txt hook_point=model.layers.7:out dtype=float32. With --word
    amplify=1x or calibrate=1x, n_latents=8 controls=3 by=weights explained=DIR. For a dictionary of
    images, prompts are files of pictures, beside targets=[dog, cat] and cache=CACHE.
    """
    if is_config(path):
        given = {"--latent": latent, "--word": word, "--prompt": prompt, "--model": model}
        given |= {"--chat": chat, "--sweep": sweep, "--force": force}
        given |= {"--read-out": read_out != "linear"}
        if used := [name for name, value in given.items() if value]:
            raise ConfigError(f"{used[0]} must stand beside a dictionary, got the config {path}")
        run_to("steer", path, overrides)
        return
    named = {"latents": latent or [], "prompts": prompt, "model": model, "output": output}
    options = {key: value for key, value in named.items() if value is not None}
    options |= {key: True for key, is_set in (("chat", chat), ("force", force)) if is_set}
    options |= {"read_out": read_out} if read_out != "linear" else {}
    if word:
        if latent or sweep:
            wrong = "--latent" if latent else "--sweep"
            raise ConfigError(f"{wrong} must be absent beside --word, got one")
        asked = {**options, "words": word}
        del asked["latents"]
        _steer_words(path, load_overrides(SteerWordsRequest, overrides or [], asked))
        return
    _steer_latents(path, load_overrides(SteerRequest, overrides or [], {**options, "sweep": sweep}))


def _steer_latents(path: str, request: SteerRequest) -> None:
    """Print texts, or words of pictures, with latents changed; or write a sweep of one."""
    from sae.run.context import with_differences
    from sae.run.steering import continuations, placed_in_model, sweep_latent
    from sae.run.steering_by_words import steer_pictures_of

    if request.targets:
        console.parts([steer_pictures_of(path, request).section])
        return
    where = (request.model, request.dtype, request.hook_point)
    dictionary, loaded, differs = placed_in_model(
        path, *where, force=request.force, read_out=request.read_out
    )
    if request.sweep:
        with console.step("sweep") as progress:
            swept = sweep_latent(path, dictionary, loaded, request, progress)
        name = f"steer-{Path(path).name}-{swept.latent}"
        section = swept._replace(differs=differs).write(Path(request.output or name))
        console.table(section.title, section.table)
        return
    for text in continuations(dictionary, loaded, request):
        note = (
            f"{', '.join(request.latents)} ran on {text.n_chosen} tokens and changed "
            f"{text.n_changed}, by {text.relative_size:.2f} of the stream's norm"
        )
        note = with_differences(note, {path: differs} if differs else {})
        console.side_by_side(text.prompt, ("base", text.base), ("steered", text.steered), note)


def _steer_words(path: str, request: SteerWordsRequest) -> None:
    """Print what the latents about some words do, and write it where a place is named."""
    from sae.run.steering_by_words import steer_words_of

    with console.step("arms") as progress:
        steered = steer_words_of(path, request, progress)
    console.parts(steered.sections)
    if request.output is not None:
        console.say(f"figures: {steered.write(Path(request.output))}")


def find(  # noqa: PLR0913
    path: Annotated[str, typer.Argument(metavar="DICT", help="A dictionary.")],
    overrides: Overrides = None,
    pos: Annotated[
        list[str] | None, typer.Option(help="A text, or picture, in which it fires.")
    ] = None,
    neg: Annotated[list[str] | None, typer.Option(help="One in which it does not.")] = None,
    near: Annotated[int | None, typer.Option(help="Neighbours of this latent.")] = None,
    prompt: Annotated[str | None, typer.Option(help="With target=: what it depends on.")] = None,
    model: Annotated[str | None, typer.Option(help="If the dictionary does not name it.")] = None,
    force: ForceOption = False,
) -> None:
    """Find latents: by texts (--pos, --neg), near another one (--near), behind a prediction.

    For a dictionary of images these are files of pictures, and target= is a word of CLIP's tower.

    KEY=VALUE: n=20 where=last among=OTHER_DICT target=" Paris" against=" Rome" hook_point=...
    cache=CACHE for pictures.
    """
    named = {"pos": pos, "neg": neg, "near": near, "prompt": prompt, "model": model}
    options = {key: value for key, value in named.items() if value is not None}
    options |= {"force": True} if force else {}
    request = load_overrides(FindRequest, overrides or [], options)
    from sae.run.finding import find_latents_of

    matches = find_latents_of(path, request, console.step)
    console.table(matches.title, matches.table)


def concepts(  # noqa: PLR0913
    path: Annotated[str, typer.Argument(metavar="DICT", help="A dictionary.")],
    overrides: Overrides = None,
    sets: Annotated[
        str | None, typer.Option("--concepts", help="A folder or a file of records.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What the model continues; repeatable.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The token whose logit is asked.")] = None,
    model: Annotated[str | None, typer.Option(help="If the dictionary does not name it.")] = None,
    force: ForceOption = False,
    bottleneck: Annotated[
        str | None, typer.Option(help="Instead: records of text, answer and concepts (.jsonl).")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="For the figures.")] = Path("concepts"),
) -> None:
    """Test by TCAV whether a next token's logit moves along concepts, on stream and latents.

    A folder has NAME.txt (a text per line) or NAME/ (a text per file); records have the field
    `concept` (label=FIELD). KEY=VALUE: prompt_file=FILE against=" Rome" sets=119 texts=30
    random=FILE random_field=text sides=greater level=0.05 hook_point=PLACE dtype=float32.

    With --bottleneck answers are fitted by way of concepts, and concepts corrected: k=5 head=tree
    answer=FIELD concepts=FIELD.
    """
    named = {"concepts": sets, "prompts": prompt, "target": target, "model": model}
    options = {key: value for key, value in named.items() if value is not None}
    options |= {"force": True} if force else {}
    from sae.run.concept_sets import bottleneck_of, concepts_of

    if bottleneck is not None:
        if used := [name for name in ("concepts", "prompts", "target") if name in options]:
            raise ConfigError(f"{used[0]} must be absent beside --bottleneck, got one")
        asked = {**options, "records": bottleneck}
        request = load_overrides(BottleneckRequest, overrides or [], asked)
        tested = bottleneck_of(path, request, console.step)
    else:
        request = load_overrides(ConceptsRequest, overrides or [], options)
        tested = concepts_of(path, request, console.step)
    console.parts([tested.section])
    console.say(f"figures: {tested.write(out)}")


def refine(
    path: Annotated[str, typer.Argument(metavar="DICT", help="A dictionary.")],
    cache: Annotated[str, typer.Option("--cache", metavar="CACHE", help="What it was trained on.")],
    hook_point: Annotated[
        str | None, typer.Option(help="Of the cache, where DICT names none.")
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="Training rows that are read.")] = 16_384,
    distil: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Also fit a linear encoder to it, and write it here."),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Set the refined read-out of a dictionary: which latents stay after a second encoding.

    It lies beside the dictionary, or for one of another library in the user's cache, and is used
    where --read-out refined is given. The dictionary itself is not changed.
    """
    from sae.run.refining import distil as distil_to
    from sae.run.refining import refine as refine_on

    with console.step("refine") as progress:
        refined = refine_on(
            path, cache, hook_point=hook_point, rows=rows, force=force, progress=progress
        )
    console.table(refined.section.title, refined.section.table)
    if distil is None:
        return
    with console.step("distil") as progress:
        made = distil_to(path, cache, distil, hook_point=hook_point, force=force, progress=progress)
    console.table("distilled", made.section.table)
