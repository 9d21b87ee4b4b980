"""Chatty libraries -> quiet ones, so that what hf-dp says can be read."""

import warnings


def quiet() -> None:
    """Errors only from transformers, datasets and Python's warnings; bars for downloads stay, bars for loading weights
    go.
    """
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    for library in (transformers.utils.logging, datasets.utils.logging):
        library.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
