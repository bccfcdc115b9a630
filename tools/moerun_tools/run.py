"""moe-run: writes text with a Mixture-of-Experts model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from moerun_tools.cache_options import cache_arguments, cache_options
from moerun_tools.command import GroupedOption, ToolCommand, version_option
from moerun_tools.device_options import DeviceName, check_cpu_kernels
from moerun_tools.run_options import check_usage, generation_options

_Function = TypeVar("_Function", bound=Callable[..., Any])

_MAX_NEW_TOKENS = 128  # where neither the command line nor the model says

_EPILOG = """\b
Examples:
  moe-run "def main():"                        continue a text with the shipped model
  moe-run -m path/to/model -f prompt.txt -n 400
  moe-run -m allenai/OLMoE-1B-7B-0924 "Bitcoin is"
  moe-run -m allenai/OLMoE-1B-7B-0924-Instruct --chat -i
  git diff | moe-run --temperature 0.8 --seed 1
  moe-run --json "import os" | jq .stats

\b
Models that do not fit in memory:
  moe-run -m Qwen/Qwen3-30B-A3B --expert-budget 6GiB --dry-run
  moe-run -m Qwen/Qwen3-30B-A3B --expert-budget 6GiB --stats "Routers are"
  moe-run --expert-budget 25% --prefetch on --stats "import os"
  moe-run -m path/to/model --expert-budget 6GiB --split 0.4 --pack "Routers are"
  moe-run -m path/to/model --remove-pack
  moe-run -m path/to/model --expert-budget 6GiB --plan auto -i          plans while it runs
  moe-run -m path/to/model --plan plan.json --save-plan warm.json -i    starts warm next time

\b
Many prompts at once:
  moe-run --batch prompts.jsonl -o texts.jsonl          a prompt a line: {"prompt": "import os"}
  moe-run --batch prompts.jsonl -o texts.jsonl --resume --batch-size 64 --kv-budget 2GiB
  moe-run --batch prompts.jsonl -o texts.jsonl --predictor predictor.safetensors

\b
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C, 143 by SIGTERM.
"""


def _option(group: str, *names: str, **attributes: Any) -> Callable[[_Function], _Function]:
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


@click.command(
    name="moe-run",
    cls=ToolCommand,
    epilog=_EPILOG,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
)
@click.argument("prompt", required=False)
@_option("Prompt", "-f", "--file", metavar="FILE", help="Read the prompt from FILE (- for stdin).")
@_option("Prompt", "-i", "--interactive", is_flag=True, help="Answer line after line.")
@_option("Prompt", "--chat", is_flag=True, help="Use the model's chat template.")
@_option("Prompt", "--system", metavar="TEXT", help="System message of the chat.")
@_option(
    "Model",
    "-m",
    "--model",
    metavar="MODEL",
    help="Directory or Hugging Face repository id.  [default: the shipped tiny-olmoe]",
)
@_option(
    "Model",
    "--device",
    type=DeviceName(),
    default="auto",
    help="Where the model runs; auto takes a usable CUDA device, else the CPU.",
)
@_option(
    "Model",
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    help="CPU threads.  [default: one a core]",
)
@_option(
    "Model",
    "--context-length",
    metavar="N",
    type=click.IntRange(min=1),
    help="Limit of prompt and answer together, in tokens.  [default: what the model allows]",
)
@_option(
    "Model",
    "--cpu-kernels",
    metavar="NAME",
    default="auto",
    help="Kernels for an instruction set; auto takes the fastest of this CPU.",
)
@cache_options
@_option(
    "Expert cache",
    "--save-plan",
    metavar="FILE",
    help="At the end, write slots, splits and which experts are cached, for --plan: a run with it "
    "starts warm.",
)
@_option(
    "Expert cache",
    "--remove-pack",
    is_flag=True,
    help="Only remove the record files of the model's weights, and of weights that lay in its "
    "folder before; needs no prompt.",
)
@_option(
    "Expert cache",
    "--dry-run",
    is_flag=True,
    help="Only print what each memory tier would hold; loads nothing, needs no prompt.",
)
@_option(
    "Batch",
    "--batch",
    metavar="FILE",
    help="Continue all prompts of FILE, many at once. JSON lines: a text, or an object with "
    "`prompt`, perhaps `id`, and options of its own such as `max_new_tokens` or `seed`.",
)
@_option(
    "Batch",
    "-o",
    "--output",
    metavar="FILE",
    help="JSON lines with `text`, or with `error`, in the order of the prompts.  "
    "[default: standard output]",
)
@_option(
    "Batch",
    "--batch-size",
    metavar="N",
    type=click.IntRange(min=1),
    help="Write at most N texts at once.  [default: 16]",
)
@_option(
    "Batch",
    "--kv-budget",
    metavar="SIZE",
    help="Memory limit for their keys and values, such as 2GiB; texts without room wait.  "
    "[default: what is needed, at most half of the free memory]",
)
@_option(
    "Batch",
    "--predictor",
    metavar="FILE",
    help="File of moe-predictor train for this model: predicts experts, for --schedule and "
    "--policy predictive.",
)
@_option(
    "Batch",
    "--schedule",
    type=click.Choice(["on", "off", "auto"]),
    help="Run twice as many texts, and decode those together that will use the same experts; "
    "auto: while that is not slower.  [default: auto with --predictor, else off]",
)
@_option("Batch", "--resume", is_flag=True, help="Go on where an interrupted run ended.")
@_option("Batch", "--overwrite", is_flag=True, help="Replace results that are there.")
@generation_options
@_option(
    "Output", "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
)
@_option(
    "Output",
    "--stats",
    is_flag=True,
    help="At the end, also print times, memory, sampling and what the expert cache did.",
)
@_option(
    "Output",
    "--layer-stats",
    is_flag=True,
    help="As --stats, with a table of the layers.",
)
@_option("Output", "-q", "--quiet", is_flag=True, help="No progress bar and no closing line.")
@version_option("moe-run")
def main(
    prompt: str | None,
    file: str | None,
    interactive: bool,
    chat: bool,
    system: str | None,
    model: str | None,
    device: str,
    threads: int | None,
    context_length: int | None,
    cpu_kernels: str,
    expert_budget: str | None,
    policy: str | None,
    split: list[float] | None,
    prefetch: str | None,
    plan: str | None,
    pack: bool,
    pin_limit: str | None,
    host_tier: str | None,
    save_plan: str | None,
    remove_pack: bool,
    dry_run: bool,
    batch: str | None,
    output: str | None,
    batch_size: int | None,
    kv_budget: str | None,
    predictor: str | None,
    schedule: str | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    stats: bool,
    layer_stats: bool,
    quiet: bool,
    **generation: Any,
) -> None:
    """Continue PROMPT with a Mixture-of-Experts model.

    Without PROMPT and without --file, the prompt is read from standard input; at a terminal, a
    built-in one is used. The text goes to standard output, everything else to standard error.
    """
    check_usage(
        prompt, file, interactive, chat, system, save_plan, dry_run, remove_pack, batch, output,
        batch_size, kv_budget, predictor, schedule, resume, overwrite, as_json,
        stats or layer_stats, generation["stop"],
    )  # fmt: skip
    if predictor is not None and all(each is None for each in (policy, split, plan)):
        policy = "predictive"

    machine = {"device": device, "threads": threads, "context_length": context_length}
    cache = cache_arguments(
        expert_budget, policy, split, prefetch, plan, pack, pin_limit, host_tier
    )
    check_cpu_kernels(cpu_kernels)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of a download

    # Imported here, so that --help and wrong usage answer at once.
    from moerun.generation_defaults import GenerationDefaults
    from moerun.hub import resolve_model
    from moerun.user_files import user_path
    from moerun_tools.closing import Closing
    from moerun_tools.conversation import Conversation
    from moerun_tools.interactive import Dialogue
    from moerun_tools.loading import load_model
    from moerun_tools.output_file import check_target
    from moerun_tools.prompt import checked_text, read_prompt
    from moerun_tools.prompt_model import PromptModel
    from moerun_tools.run_once import remove_pack as run_remove_pack
    from moerun_tools.run_once import run_once, show_dry_run, store_plan

    if remove_pack:
        run_remove_pack(resolve_model(model))
        return
    if dry_run:
        show_dry_run(resolve_model(model), as_json, **machine, **cache)
        return
    system = None if system is None else checked_text(system, "--system")
    generation["stop"] = [checked_text(text, "--stop") for text in generation["stop"]] or None
    text = read_prompt(prompt, file) if prompt is not None or file is not None else None
    directory = resolve_model(model)  # before standard input, which may take long to end
    prompt_model = PromptModel.of(directory, context_length)
    conversation = Conversation(prompt_model, chat, system)
    defaults = GenerationDefaults.of_model(directory)
    if not quiet:
        for note in defaults.notes:
            click.echo(f"note: {note}", err=True)
    if generation["max_new_tokens"] is None and defaults.max_new_tokens is None:
        generation["max_new_tokens"] = _MAX_NEW_TOKENS
    if text is None and not interactive and batch is None:
        text = read_prompt(None, None)
    token_ids = conversation.ask(text) if text is not None and not interactive else []
    job = None
    if batch is not None:
        from moerun_tools.batch_run import BatchJob

        job = BatchJob.prepare(
            batch,
            output,
            directory,
            resume,
            overwrite,
            quiet,
            batch_size=batch_size,
            kv_budget=kv_budget,
            predictor=predictor,
            schedule=None if schedule is None else {"on": True, "off": False}.get(schedule, "auto"),
            chat=chat,
            system=system,
            context_length=context_length,
            generation=defaults.merged(generation),
            given=generation,
        )
    saved = None if save_plan is None else user_path(save_plan)
    if saved is not None:
        check_target(saved, [])
    closing = Closing(quiet, stats, layer_stats)
    with load_model(
        directory,
        quiet,
        cpu_kernels=cpu_kernels,
        **machine,
        **cache,
    ) as loaded:
        loaded.generation_defaults = defaults  # its notes have been said
        failed = 0
        if job is not None:
            failed = job.run(loaded, prompt_model, as_json=as_json, closing=closing)
        elif interactive:
            Dialogue(loaded, conversation, closing, "moe-run", generation).run(text)
        else:
            echo = "" if chat or text is None else text
            run_once(loaded, token_ids, echo, as_json, closing, generation)
        if saved is not None:
            loaded.save_plan(saved)
        if plan == "auto":
            store_plan(loaded)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="moe-run")
