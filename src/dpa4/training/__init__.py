"""Training of potentials, and their errors on labelled structures."""

from dpa4.training.committee import train_committee
from dpa4.training.deepmd_input import TranslatedInput, convert_input
from dpa4.training.dry_run import DryRun, dry_run
from dpa4.training.evaluation import ErrorTable, evaluate
from dpa4.training.options import RunConfig
from dpa4.training.recipes import recipe_for, summary_of
from dpa4.training.run import train
from dpa4.training.run_file import default_config_text, load_run_config, recipe_text

__all__ = [
    "DryRun",
    "ErrorTable",
    "RunConfig",
    "TranslatedInput",
    "convert_input",
    "default_config_text",
    "dry_run",
    "evaluate",
    "load_run_config",
    "recipe_for",
    "recipe_text",
    "summary_of",
    "train",
    "train_committee",
]
