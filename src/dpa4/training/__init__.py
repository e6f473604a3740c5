"""Training of potentials, and their errors on labelled structures."""

from dpa4.training.deepmd_input import TranslatedInput, convert_input
from dpa4.training.evaluation import ErrorTable, evaluate
from dpa4.training.options import RunConfig
from dpa4.training.recipes import recipe_for, summary_of
from dpa4.training.run_file import default_config_text, load_run_config, recipe_text
from dpa4.training.trainer import train

__all__ = [
    "ErrorTable",
    "RunConfig",
    "TranslatedInput",
    "convert_input",
    "default_config_text",
    "evaluate",
    "load_run_config",
    "recipe_for",
    "recipe_text",
    "summary_of",
    "train",
]
