"""Libraries that print much -> quiet ones, so that what hf-dp prints can be read."""

import logging
import warnings


def quiet() -> None:
    """Only errors from transformers, datasets and bitsandbytes, and no warnings of Python's. Progress bars of downloads
    stay; those for loading weights go.
    """
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    for library in (transformers.utils.logging, datasets.utils.logging):
        library.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some processors it advises an install, each time
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
