"""CEL, the language of a Projection's expressions, compiled to Python. docs/expressions.md documents the subset.

`syntax` reads text, `compiler` checks it and emits Python, `runtime` is what that Python calls.
"""

from refold.projection.cel.compiler import FAILURES, HELPERS, Expression, check, function, python_function
from refold.projection.cel.errors import CelError, EvaluationError
from refold.projection.cel.kinds import Kind, describe

__all__ = [
    "FAILURES",
    "HELPERS",
    "CelError",
    "EvaluationError",
    "Expression",
    "Kind",
    "check",
    "describe",
    "function",
    "python_function",
]
