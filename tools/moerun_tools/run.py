"""moe-run: writes text with a Mixture-of-Experts model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from moerun_tools.cache_options import cache_arguments, cache_options
from moerun_tools.command import FiniteFloat, GroupedOption, ToolCommand, version_option
from moerun_tools.device_options import DeviceName, check_cpu_kernels

_Function = TypeVar("_Function", bound=Callable[..., Any])

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
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C.
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
    help="Most tokens of prompt and answer together.  [default: what the model allows]",
)
@_option(
    "Model",
    "--cpu-kernels",
    metavar="NAME",
    default="auto",
    help="Kernels for a kind of CPU; auto takes the fastest that this one runs.",
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
    help="Most texts that are written at once.  [default: 16]",
)
@_option(
    "Batch",
    "--kv-budget",
    metavar="SIZE",
    help="Most memory for their keys and values, such as 2GiB; texts without room wait.  "
    "[default: what is needed, at most half of the free memory]",
)
@_option(
    "Batch",
    "--predictor",
    metavar="FILE",
    help="Of moe-predictor train, for this model: tells which experts a text will use, for "
    "--schedule and --policy predictive.",
)
@_option(
    "Batch",
    "--schedule",
    type=click.Choice(["on", "off", "auto"]),
    help="Run twice as many texts, and write those together that will use the same experts; auto: "
    "for as long as that is not slower.  [default: auto with --predictor, else off]",
)
@_option("Batch", "--resume", is_flag=True, help="Go on where another run ended, if one did.")
@_option("Batch", "--overwrite", is_flag=True, help="Replace results that are there.")
@_option(
    "Generation",
    "-n",
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=128,
    help="Most tokens to generate.",
)
@_option(
    "Generation",
    "--temperature",
    metavar="X",
    type=FiniteFloat(min=0),
    default=0.0,
    help="Above 0, sample instead of taking the likeliest token.",
)
@_option(
    "Generation",
    "--top-k",
    metavar="K",
    type=click.IntRange(min=0),
    default=0,
    help="Sample among the k likeliest tokens; 0 for all.",
)
@_option(
    "Generation",
    "--top-p",
    metavar="P",
    type=FiniteFloat(min=0, max=1, min_open=True),
    default=1.0,
    help="Sample among the likeliest tokens that together have this probability.",
)
@_option(
    "Generation",
    "--min-p",
    metavar="P",
    type=FiniteFloat(min=0, max=1),
    default=0.0,
    help="Leave out tokens less likely than this share of the likeliest one.",
)
@_option(
    "Generation",
    "--repetition-penalty",
    metavar="X",
    type=FiniteFloat(min=0, min_open=True),
    default=1.0,
    help="Above 1, tokens that are already there become less likely.",
)
@_option(
    "Generation",
    "--seed",
    type=click.IntRange(min=0, max=2**64 - 1),
    show_default="a random one, which is reported",
    metavar="N",
    help="Same seed, same text.",
)
@_option(
    "Generation",
    "--stop",
    metavar="TEXT",
    multiple=True,
    help="End when this text has been written; may be given more than once.",
)
@_option("Generation", "--ignore-eos", is_flag=True, help="Go on when the model ends its text.")
@_option(
    "Output", "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
)
@_option("Output", "--stats", is_flag=True, help="Print at the end what the expert cache did.")
@_option("Output", "-q", "--quiet", is_flag=True, help="No progress bar and no closing lines.")
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
    quiet: bool,
    **generation: Any,
) -> None:
    """Continue PROMPT with a Mixture-of-Experts model.

    Without PROMPT and without --file, the prompt is read from standard input; at a terminal, a
    built-in one is used. The text goes to standard output, everything else to standard error.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("PROMPT and --file exclude each other.")
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat.")
    if interactive and as_json:
        raise click.UsageError("--interactive and --json exclude each other.")
    if stats and as_json:
        raise click.UsageError("--stats and --json exclude each other: JSON holds the statistics.")
    if save_plan == "":
        raise click.UsageError("--save-plan needs a name that is not empty.")
    if any(not text for text in generation["stop"]):
        raise click.UsageError("--stop needs a text that is not empty.")

    if batch is not None and (prompt is not None or file is not None or interactive):
        raise click.UsageError("--batch takes the place of PROMPT, --file and --interactive.")
    if batch is None and not all(
        each is None for each in (output, batch_size, kv_budget, predictor, schedule)
    ):
        raise click.UsageError(
            "--output, --batch-size, --kv-budget, --predictor and --schedule need --batch."
        )
    if schedule in ("on", "auto") and predictor is None:
        raise click.UsageError("--schedule needs --predictor.")
    if batch is not None and (dry_run or remove_pack):
        raise click.UsageError("--batch excludes --dry-run and --remove-pack.")
    if (resume or overwrite) and output in (None, "-"):
        raise click.UsageError("--resume and --overwrite need --output.")
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other.")
    if batch is not None and as_json and output in (None, "-"):
        raise click.UsageError("--batch with --json needs --output, for standard output has both.")

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
    from moerun.hub import resolve_model
    from moerun_tools.conversation import Conversation
    from moerun_tools.interactive import converse
    from moerun_tools.loading import load_model
    from moerun_tools.output_file import check_target
    from moerun_tools.prompt import checked_text, read_prompt
    from moerun_tools.run_once import remove_pack as run_remove_pack
    from moerun_tools.run_once import run_once, show_dry_run, store_plan

    if remove_pack:
        run_remove_pack(resolve_model(model))
        return
    if dry_run:
        show_dry_run(resolve_model(model), as_json, **machine, **cache)
        return
    system = None if system is None else checked_text(system, "--system")
    generation["stop"] = [checked_text(text, "--stop") for text in generation["stop"]]
    text = read_prompt(prompt, file) if prompt is not None or file is not None else None
    directory = resolve_model(model)  # before standard input, which may take long to end
    if text is None and not interactive and batch is None:
        text = read_prompt(None, None)
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
            generation=generation,
        )
    saved = None if save_plan is None else Path(save_plan).expanduser()
    if saved is not None:
        check_target(saved, [])
    with load_model(
        directory,
        quiet,
        cpu_kernels=cpu_kernels,
        **machine,
        **cache,
    ) as loaded:
        failed = 0
        if job is not None:
            failed = job.run(loaded, as_json=as_json, quiet=quiet, show_stats=stats)
        elif interactive:
            conversation = Conversation(loaded, chat, system)
            converse(loaded, conversation, text, quiet, stats, "moe-run", **generation)
        else:
            assert text is not None
            conversation = Conversation(loaded, chat, system)
            run_once(loaded, conversation, text, not chat, as_json, quiet, stats, generation)
        if saved is not None:
            loaded.save_plan(saved)
        if plan == "auto":
            store_plan(loaded)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="moe-run")
