"""Command that prepares the fine-tuning of a trained model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dpa4.cli.options import Branch, OverwriteFile, console, one_model, say_next, user_errors


@one_model("fine-tuning starts from one model; for a committee, add --committee to dpa4 train")
def finetune(
    model: Annotated[
        str,
        typer.Argument(
            help="Model to start from: .safetensors, deepmd-kit checkpoint (.pt), or "
            "hf:organisation/repository/file."
        ),
    ],
    train: Annotated[
        list[str],
        typer.Option(help="Training data: file, folder or pattern in quotes; may be repeated."),
    ],
    validation: Annotated[
        list[str] | None,
        typer.Option(help="Validation data, as for --train; without, a part of the training data."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run file to write.")] = Path(
        "finetune.yaml"
    ),
    drop_elements: Annotated[
        bool, typer.Option("--drop-elements", help="Leave out the elements of the model that the data lack.")
    ] = False,
    branch: Branch = None,
    ema: Annotated[
        bool,
        typer.Option("--ema", help="Start from the averaged weights that a deepmd-kit checkpoint may hold."),
    ] = False,
    overwrite: OverwriteFile = False,
) -> None:
    """Write a commented configuration file for a run that continues a trained model on other data."""
    from dpa4.output import atomic_write, check_replaceable
    from dpa4.system import choose_device
    from dpa4.training import recipe_text
    from dpa4.training.finetuning_recipe import finetuning_recipe, network_text
    from dpa4.training.recipes import choice_table, summary_of

    with user_errors():
        check_replaceable(output, overwrite)
        named: dict[str, Any] = {"start_from": model, "start_branch": branch, "start_ema": ema}
        config, sample, elements = _start_and_data(named, train, validation or [])
        named["elements"] = elements if drop_elements else "auto"
        summary, device = summary_of(sample, config.cutoff), choose_device("auto").type
        choice = finetuning_recipe(summary, config, {f"model.{k}": v for k, v in named.items()}, device)
        text = recipe_text(train, choice, validation or [])
        console.print(choice_table(summary, choice, device, network_text(config)))
        for warning in choice.warnings:
            console.print(f"note: {warning}")
        with atomic_write(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    console.print(f"wrote {output}; look through it", soft_wrap=True, highlight=False)
    say_next(f"dpa4 train {output} --dry-run", f"time and memory of the run; then dpa4 train {output}")


def _start_and_data(
    named: dict[str, Any], train: list[str], validation: list[str]
) -> tuple[Any, Any, list[str]]:
    """Configuration of the start, a sample of the training data, and all elements that were found.

    Raises:
        ValueError: If the start lacks one of them.
    """
    from dpa4.data import find_sources
    from dpa4.data.sampling import read_sample
    from dpa4.data.summary import elements_in
    from dpa4.training.options import ModelOptions
    from dpa4.training.start import check_elements_of_start, load_start

    start = load_start(ModelOptions.model_validate(named))
    samples = []
    for entries in filter(None, (train, validation)):
        sources = find_sources(entries)
        if sources.searched:
            console.print(sources.text, soft_wrap=True)
        samples.append(read_sample(sources.paths))
        check_elements_of_start(samples[-1].frames, start)
    elements = elements_in([frame for sample in samples for frame in sample.frames])
    return start.potential.config, samples[0], elements
