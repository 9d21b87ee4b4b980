"""Arguments of `hf-dp` -> the verb that they name. A user's mistake ends in a few lines on stderr and exit status 2.

Heavy libraries are imported by a verb only when it runs.
"""

import errno
import os
import sys
from typing import Annotated

import typer

import hf_dp
from hf_dp.cli.audit import audit
from hf_dp.cli.budget import budget
from hf_dp.cli.card import card
from hf_dp.cli.check import check
from hf_dp.cli.compare import compare
from hf_dp.cli.generate import generate
from hf_dp.cli.init import init
from hf_dp.cli.libraries import quiet
from hf_dp.cli.merge import merge
from hf_dp.cli.plan import plan
from hf_dp.cli.push import push
from hf_dp.cli.recipe import recipe
from hf_dp.cli.report import report
from hf_dp.cli.sweep import sweep
from hf_dp.cli.texts import Sampling, texts
from hf_dp.cli.train import train
from hf_dp.cli.verify import verify
from hf_dp.errors import HfDpError

__all__ = ["Sampling", "main", "quiet", "texts"]

USER_ERROR = 2

app = typer.Typer(
    name="hf-dp",
    help="Fine-tune Hugging Face models with differential privacy, and an epsilon that is true.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _tell_version(asked), help="The version.")
    ] = False,
) -> None:
    """Options of `hf-dp` itself."""


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"hf_dp {hf_dp.__version__}")
        raise typer.Exit


app.command()(init)
app.command()(recipe)
app.command()(train)
app.command()(check)
app.command()(plan)
app.command()(verify)
app.command()(card)
app.command()(report)
app.command()(merge)
app.command()(generate)
app.command()(push)
app.command()(budget)
app.command()(compare)
app.command()(audit)
app.command()(sweep)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
RESUMED = (
    "What was charged is in the ledger. Make room; a training with complete checkpoints goes on with "
    "training.resume_from_checkpoint=true"
)


def main() -> None:
    """The entry point of `hf-dp`."""
    try:
        app()
    except HfDpError as error:
        first, *rest = str(error).splitlines() or [type(error).__name__]
        start = "hf-dp: the recipe has mistakes:\n" if first.startswith("  - ") else "hf-dp: "
        print("\n".join([start + first, *rest]), file=sys.stderr)
        sys.exit(USER_ERROR)
    except Exception as error:  # libraries that write files have errors of their own
        if getattr(error, "errno", None) not in NO_ROOM and os.strerror(errno.ENOSPC) not in str(error):
            raise
        print(f"hf-dp: there is no room on the disk ({error}). {RESUMED}", file=sys.stderr)
        sys.exit(USER_ERROR)
