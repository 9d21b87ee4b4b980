"""The exception tree: what goes wrong, with one class for each party that can put it right.

HfDpError
├── ConfigError (also ValueError)                the user asked for something impossible or unsafe
│   ├── BudgetError                              ... more than a budget file allows all runs together, or other data
│   ├── RecipeError                              ... in a recipe file or its overrides
│   └── UnsupportedOptionError                   ... by options that would void the guarantee; names all of them
├── UnsupportedParameterError (also ValueError)  trainable parameters without an exact per-example rule; names them all
├── AccountingError (also ValueError)            an accountant's input or output is not a number that can be trusted
├── AuditError (also ValueError)                 scores or counts from which no bound on epsilon follows
├── LedgerError (also RuntimeError)              the record of what was spent is missing, damaged, or of another run
├── ReleaseError (also RuntimeError)             a sum that must not be released: wrong arguments, or a second release
├── CaptureError (also RuntimeError)             in a pass, a gradient was not seen example by example
└── SelfCheckError (also ValueError)             a batch's gradient is not the sum of its examples': they are coupled
"""


class HfDpError(Exception):
    """Base of every error that hf_dp raises on purpose."""


class ConfigError(HfDpError, ValueError):
    """A setting that is impossible, contradictory or unsafe."""


class BudgetError(ConfigError):
    """A run that does not fit into its budget file, or a budget file that cannot be used."""


class RecipeError(ConfigError):
    """A recipe file, or an override of one, that is not valid."""


class UnsupportedOptionError(ConfigError):
    """Options that would void the guarantee. The message names all of them, each with its remedy."""


class UnsupportedParameterError(HfDpError, ValueError):
    """Trainable parameters for which no exact per-example rule exists. The message names all of them."""


class AccountingError(HfDpError, ValueError):
    """An input that an accountant would answer wrongly, or an answer that cannot be true."""


class AuditError(HfDpError, ValueError):
    """Scores or counts of an audit from which no bound on epsilon follows."""


class LedgerError(HfDpError, RuntimeError):
    """A ledger that is missing, damaged, locked, or belongs to another run."""


class ReleaseError(HfDpError, RuntimeError):
    """A sum that must not be released: arguments out of range, a draw that was released before, or processes out of
    step.
    """


class CaptureError(HfDpError, RuntimeError):
    """A gradient reached a parameter without having been seen example by example."""


class UnseenUse(CaptureError):
    """A pass over several examples uses a parameter as passes on public records did not."""


class SelfCheckError(HfDpError, ValueError):
    """The gradient of a batch is not the sum of the gradients of its examples."""
