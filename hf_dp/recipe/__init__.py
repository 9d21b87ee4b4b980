"""A YAML recipe goes in; its data, model, trainer and cost come out."""

from hf_dp.recipe import data_files, model_shapes, run_cost, task
from hf_dp.recipe.examples import PadRight, columns_in_words, completions
from hf_dp.recipe.recipe import DataSection, Recipe, from_mapping, is_file, read
from hf_dp.recipe.task import training_arguments
from hf_dp.recipe.template import Template
from hf_dp.recipe.yaml_text import nested, parse

__all__ = [
    "DataSection",
    "PadRight",
    "Recipe",
    "Template",
    "columns_in_words",
    "completions",
    "data_files",
    "from_mapping",
    "is_file",
    "model_shapes",
    "nested",
    "parse",
    "read",
    "run_cost",
    "task",
    "training_arguments",
]
