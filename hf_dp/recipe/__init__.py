"""A YAML recipe goes in; its data, model, trainer and cost come out."""

from hf_dp.recipe import data_files, gpu_cost, model_shapes, run_cost, task
from hf_dp.recipe.columns import OF_EACH, Guess, guessed, warnings
from hf_dp.recipe.examples import Example, PadRight, completions
from hf_dp.recipe.keys import all_keys
from hf_dp.recipe.recipe import FILE_KINDS, DataSection, Recipe, from_mapping, is_file, read
from hf_dp.recipe.records import check_columns, columns_in_words
from hf_dp.recipe.starting import Wanted, starting_recipe
from hf_dp.recipe.task import training_arguments
from hf_dp.recipe.tasks import TASKS
from hf_dp.recipe.template import Template
from hf_dp.recipe.yaml_text import nested, parse

__all__ = [
    "FILE_KINDS",
    "OF_EACH",
    "TASKS",
    "DataSection",
    "Example",
    "Guess",
    "PadRight",
    "Recipe",
    "Template",
    "Wanted",
    "all_keys",
    "check_columns",
    "columns_in_words",
    "completions",
    "data_files",
    "from_mapping",
    "gpu_cost",
    "guessed",
    "is_file",
    "model_shapes",
    "nested",
    "parse",
    "read",
    "run_cost",
    "starting_recipe",
    "task",
    "training_arguments",
    "warnings",
]
