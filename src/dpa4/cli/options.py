"""Arguments, options, console and error handling shared by the commands."""

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from dpa4 import __version__
from dpa4.messages import did_you_mean
from dpa4.output import already_there, tolerate_any_encoding

if TYPE_CHECKING:
    from ase import Atoms

    from dpa4.data import LabelKeys
    from dpa4.potential import Potential

_QUOTED = re.compile("'([^']*)'")

console = Console(markup=False)  # file names and options may contain square brackets

Model = Annotated[
    Path,
    typer.Argument(
        help="Model file: .safetensors, or a deepmd-kit checkpoint (.pt); hf:organisation/repository/file is one on "
        "the Hugging Face hub."
    ),
]
Members = Annotated[
    list[Path] | None,
    typer.Option("--model", help="Model, in place of the argument MODEL; repeat it for a committee."),
]
Branch = Annotated[str | None, typer.Option(help="Branch of a multitask deepmd-kit checkpoint.")]
Device = Annotated[
    str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, or cuda:1 for the second GPU.")
]
Dtype = Annotated[
    Literal["float32", "float64"],
    typer.Option(help="Floating-point type of the network: float32 or float64."),
]
Precision = Annotated[
    Literal["high", "fast"],
    typer.Option(help="high: full precision of the dtype. fast: products in bfloat16, for screening."),
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Compile the model first; by default on a GPU in float32."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
Structures = Annotated[Path, typer.Argument(help="Structures, in any format ASE reads.")]
Fmax = Annotated[float, typer.Option(help="Largest force of a relaxed structure, in eV/Angstrom.")]
Steps = Annotated[int, typer.Option(help="Maximum number of steps per structure.")]
Symprec = Annotated[float, typer.Option(help="Tolerance of the symmetry search, in Angstrom.")]
Skin = Annotated[float, typer.Option(help="Verlet skin of the neighbour list, in Angstrom.")]
MaxAtoms = Annotated[int, typer.Option(help="Maximum number of atoms per batch.")]
Keys = Annotated[
    list[str] | None,
    typer.Option("--key", help="Name of a label in the data, as energy=dft_energy; may be repeated."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the results of an earlier run in the output folder.")
]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]


class Command(TyperCommand):
    """Command with paths that may begin with ~, and with models that may be options.

    A shell leaves ~ as it is in ``--output=~/run``. A model is the argument MODEL; several are options ``--model``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; the first option ``--model`` also stands for the argument MODEL."""
        try:
            return self._parsed(ctx, args)
        except typer.BadParameter as error:
            error.message = _with_near_name(error.message)
            raise

    def _parsed(self, ctx: Any, args: list[str]) -> list[str]:
        models = [] if ctx.resilient_parsing else _values_of("--model", args)  # resilient: to complete a word
        if models and (reason := getattr(self.callback, "refuses_committee", None)):
            ctx.fail(f"{ctx.command_path} needs one model, as its first argument: {reason}")
        if not models or "models" not in {parameter.name for parameter in self.params}:  # as in dpa4 select
            return super().parse_args(ctx, args)
        if stray := [arg for before, arg in zip(["", *args], args, strict=False) if _is_model(before, arg)]:
            ctx.fail(f"{stray[0]} is an argument, {models[0]} an option; give each model with --model")
        return super().parse_args(ctx, [models[0], *args])

    def invoke(self, ctx: Any) -> Any:
        """Replace the home folder in every path and list of paths, then run the command."""
        ctx.params = {name: _expanded(value) for name, value in ctx.params.items()}
        return super().invoke(ctx)


def _with_near_name(message: str) -> str:
    """Message about a value that is none of the choices of an option, with the choice that was probably meant."""
    text = message.removeprefix("Value error, ")
    found = re.fullmatch(r"'(.*)' is not one of (.*)\.", text, re.DOTALL)
    if not found:
        return text
    return f"{text[:-1]}{did_you_mean(found[1], _QUOTED.findall(found[2]))}."


def _values_of(option: str, args: list[str]) -> list[str]:
    """Values of an option among the arguments of a command line, up to ``--``."""
    args = args[: args.index("--")] if "--" in args else args
    inline = [arg.partition("=")[2] for arg in args if arg.startswith(f"{option}=")]
    return inline + [value for arg, value in zip(args, args[1:], strict=False) if arg == option]


def _is_model(before: str, argument: str) -> bool:
    """Return whether an argument that follows another one is the name of a model, and no value of an option."""
    return (
        argument.endswith((".safetensors", ".pt"))
        and not argument.startswith("-")
        and not before.startswith("-")
    )


def _expanded(value: Any) -> Any:
    if isinstance(value, Path):
        from dpa4.system import user_path

        return user_path(value)
    return [_expanded(one) for one in value] if isinstance(value, list | tuple) else value


class _Group(TyperGroup):
    """Group whose help has a line or two for each command, where typer cuts the text off."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write names and descriptions of the commands."""
        found = {name: self.commands[name] for name in self.list_commands(ctx)}
        rows = [(n, c.get_short_help_str(limit=1000)) for n, c in found.items() if not c.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class Commands(typer.Typer):
    """Group of commands of the class ``Command``, with help in plain text.

    The boxes of typer's other help leave too little room for texts on a terminal of 80 columns.
    """

    def __init__(self, **options: Any):
        super().__init__(cls=_Group, rich_markup_mode=None, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        """Return a decorator that adds a command."""
        return super().command(name, cls=Command, **options)


class ModelOptions(TypedDict, total=False):
    """Keyword arguments of ``DPA4Calculator`` and ``DPA4Model`` that are options of the commands."""

    device: str
    dtype: Literal["float32", "float64"]
    precision: Literal["high", "fast"]
    compile: bool | None
    branch: str | None


def with_model_options(
    dtype: str = "float32", precision: bool = True, committee: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options of ``ModelOptions`` to a command, after the command's own options.

    The command receives the values as one keyword argument, ``options``; of its ``model`` see ``with_committee``.

    Args:
        dtype: Default of --dtype.
        precision: If true, the command has the option --precision.
        committee: If true, the command has the option --model.
    """
    shared = {
        "device": (Device, "auto"),
        "dtype": (Dtype, dtype),
        "precision": (Precision, "high"),
        "compile": (Compile, None),
        "branch": (Branch, None),
    }
    if not precision:
        del shared["precision"]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**arguments: Any) -> None:
            options = {name: arguments.pop(name) for name in shared}
            command(**arguments, options=options)

        replaced = _with_parameters(command, run, shared)
        return with_committee(replaced) if committee else replaced

    return decorate


def with_committee(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with a parameter ``model`` so that --model, repeated, gives it a list of models.

    A single model and the output folder of a committee are passed on as a path.
    """

    def run(**arguments: Any) -> None:
        models = arguments.pop("models") or [arguments["model"]]
        command(**arguments | {"model": models[0] if len(models) == 1 else models})

    return _with_parameters(command, run, {"models": (Members, None)})


def one_model(reason: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator of a command that refuses several models, for a reason that its message gives."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        command.refuses_committee = reason  # type: ignore[attr-defined]
        return command

    return decorate


def _with_parameters(
    command: Callable[..., None], run: Callable[..., None], added: dict[str, tuple[Any, Any]]
) -> Callable[..., None]:
    """Make a function that calls a command look like it, with options added to its signature, which typer reads.

    Args:
        command: The command; its parameter ``options`` is left out.
        run: The function.
        added: Type and default of each option to add.
    """
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.name != "options"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in added.items()
    ]
    wrapped = wraps(command)(run)
    wrapped.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return wrapped


@contextmanager
def user_errors() -> Iterator[None]:
    """Print errors as one message instead of a traceback and exit with status 1; print warnings on one line.

    After a signal the status is 128 + its number, as for a program that the signal ends.
    """
    shown, warnings.showwarning = warnings.showwarning, _show_warning
    log = logging.getLogger("dpa4")
    log.addHandler(_LOGGED)
    del _caught_signals()[:]
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        _print("error:", "bold red", _in_plain_words(error))
        exit_after_signal()
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        exit_after_signal()
        raise
    finally:
        warnings.showwarning = shown
        log.removeHandler(_LOGGED)


def _in_plain_words(error: Exception) -> str:
    """Message of an error; those of pydantic without its own words, lack of memory without PyTorch's paragraph."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" and not text.startswith("out of memory: "):
        reason = " ".join(text.split()).partition(". ")[0].removesuffix(".")
        return (
            f"out of memory: {reason}; compute less at once, use a GPU with more memory or one that is free, or the "
            "CPU (--device cpu)"
        )
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return text
    from dpa4.parsing import problem

    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {problem(e)}".removeprefix(": ") for e in error.errors()
    )


def exit_after_signal(*_: Any, **__: Any) -> None:
    """End the program with the status 128 + number if a signal has ended the work of the command.

    Without that, a script would go on with an unfinished model.
    """
    if caught := _caught_signals():
        raise typer.Exit(128 + caught[0])


def check_unused(folder: Path, file: str, overwrite: bool) -> None:
    """Check that a folder does not hold the results of an earlier call of a command that cannot be resumed.

    Raises:
        FileExistsError: If the file is in it and ``overwrite`` is false.
    """
    if (folder / file).exists() and not overwrite:
        raise already_there(folder, file, resumable=False)


def say_next(command: str, remark: str = "") -> None:
    """Print a command with which users go on, and a remark, which a shell ignores."""
    console.print(f"next: {command}" + f"  # {remark}" * bool(remark), soft_wrap=True, highlight=False)


def _caught_signals() -> list[int]:
    """Signals caught since the start of the command."""
    # Not imported here, because that takes a second. Before a command has done so, it has caught none.
    system = sys.modules.get("dpa4.system")
    return [] if system is None else system.caught_signals


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"dpa4 {__version__}", highlight=False)
        raise typer.Exit()


def prepare_terminal(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Make sure that no character ends the command, whatever the encoding of the terminal, file or pipe."""
    tolerate_any_encoding()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _print("warning:", "bold yellow", " ".join(str(message).split()))


class _Logged(logging.Handler):
    """Prints warnings of the log of dpa4 like all others."""

    def emit(self, record: logging.LogRecord) -> None:
        _show_warning(record.getMessage())


_LOGGED = _Logged(logging.WARNING)


def _print(label: str, style: str, message: object) -> None:
    Console(stderr=True).print(Text.assemble((label, style), f" {message}"), soft_wrap=True)


def read_structures(file: Path, last: bool = False) -> "list[Atoms]":
    """Read the structures of a file, or the last one, in any format of ``dpa4.data.read_atoms``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read or contains no structure.
    """
    from dpa4.data import read_images

    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    found = read_images(file, last)
    if not found:
        raise ValueError(f"there is no structure in {file}")
    return found


def sources_and_structures(files: Iterable[Path]) -> "tuple[list[str], list[Atoms]]":
    """Read the structures of several files as ``read_structures`` does; return their sources and them."""
    sources: list[str] = []
    structures: list[Atoms] = []
    for file in files:
        found = read_structures(file)
        sources += [f"{file} {number}" for number in range(len(found))]
        structures += found
    return sources, structures


def last_image(file: Path) -> "Atoms":
    """Read the last structure of a file; formats and errors are those of ``read_structures``."""
    return read_structures(file, last=True)[0]


def label_keys(keys: list[str] | None) -> "LabelKeys":
    """Parse the values of --key, such as energy=dft_energy.

    Raises:
        ValueError: If a value has another form, or names an unknown label.
    """
    from dpa4.data import LabelKeys

    known = ("energy", "forces", "stress", "virial")
    names = dict(key.partition("=")[::2] for key in keys or [])
    for label, name in names.items():
        if label not in known or not name:
            raise ValueError(
                f"--key must be LABEL=NAME with a label of {', '.join(known)}, got {label}={name}"
            )
    return LabelKeys(**names)


def eager_potentials(
    model: Path | list[Path], device: str, dtype: str, branch: str | None
) -> "list[Potential]":
    """Load the members of a committee, or the single model, for a command that never compiles."""
    from dpa4.interfaces.loading import members_of

    return [eager_potential(Path(str(member)), device, dtype, branch) for member in members_of(model)]


def eager_potential(model: Path, device: str, dtype: str, branch: str | None) -> "Potential":
    """Load the potential for a command that never compiles, from the options of the command."""
    import torch

    from dpa4.potential import load_potential
    from dpa4.potential.committee import single_model
    from dpa4.system import choose_device

    model = single_model(model, "the command needs one of them")
    return load_potential(model, device=choose_device(device), dtype=getattr(torch, dtype), branch=branch)
