"""The exception tree: what goes wrong, one class for each party that can mend it.

HfDpError
├── ConfigError (also ValueError)                the user asked for something impossible or unsafe
│   ├── BudgetError                              ... more than a budget file holds for all runs, or of other data
│   ├── RecipeError                              ... in a recipe file or its overrides
│   └── UnsupportedOptionError                   ... by options that would void the guarantee; names all of them
├── UnsupportedParameterError (also ValueError)  trainable parameters without an exact per-example rule; names all of them
├── AccountingError (also ValueError)            an accountant's input or output is not a number one may trust
├── AuditError (also ValueError)              scores or counts from which no bound on epsilon follows
├── LedgerError (also RuntimeError)              the record of what was spent is missing, damaged, or of another run
├── ReleaseError (also RuntimeError)             a sum that may not leave: wrong arguments, a draw released twice, processes apart
├── CaptureError (also RuntimeError)             a gradient was not seen example by example, in the middle of a pass
└── SelfCheckError (also ValueError)             a batch is not the sum of its examples: something couples them
"""


class HfDpError(Exception):
    """Base of every error that hf_dp raises on purpose."""


class ConfigError(HfDpError, ValueError):
    """A setting that is impossible, contradictory or unsafe."""


class BudgetError(ConfigError):
    """A run that a budget file does not hold, or a budget file that cannot be used."""


class RecipeError(ConfigError):
    """A recipe file, or an override of it, that cannot be read as one."""


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
    """A sum that may not leave: arguments out of range, a draw released before, or processes that are not together."""


class CaptureError(HfDpError, RuntimeError):
    """A gradient reached a parameter without having been seen example by example."""


class SelfCheckError(HfDpError, ValueError):
    """The gradient of a batch is not the sum of the gradients of its examples."""
