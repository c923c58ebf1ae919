"""The `refold` command: one entry point for every process and for people.

Each process is imported only when it is asked for, so that `refold --help` is quick and the data plane never
loads the operator.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import structlog
import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError

from refold.cli import people
from refold.setup import SetupError

# Typer's own tracebacks show local variables, so secrets.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Refold: event sourcing and CQRS on Kubernetes.",
)

_PROCESSES = "Processes, as the chart and the operator start them"

_Auth = Annotated[
    str,
    typer.Option(
        envvar="REFOLD_AUTH",
        help="Who may call: kubernetes (TokenReview and SubjectAccessReview), tokens:FILE (see docs/authorisation.md), "
        "or none: whoever reaches the port may do everything.",
    ),
]


def _run(main: Callable[[], None]) -> None:
    """Run a process; settings that are wrong end it with exit code 2 and their names, and anything else is logged."""
    log = structlog.get_logger(__name__)
    try:
        main()
    except ValidationError as error:
        if error.title != "Settings":
            log.exception("The process failed")
            raise typer.Exit(1) from error
        # Without the values, which may be secrets.
        found = error.errors(include_input=False, include_url=False, include_context=False)
        wrong = {f"REFOLD_{'.'.join(map(str, one['loc']))}".upper(): one["msg"] for one in found}
        log.error("Environment variables are missing or wrong", variables=wrong)
        raise typer.Exit(2) from None
    except SettingsError as error:  # it names the variable's field, without the value
        log.error("An environment variable is no JSON", why=str(error))
        raise typer.Exit(2) from None
    except SetupError as error:
        log.error("A setting can't work here", why=str(error))
        raise typer.Exit(2) from None
    except Exception as error:
        log.exception("The process failed")
        raise typer.Exit(1) from error


@app.command(rich_help_panel=_PROCESSES)
def eventstore(auth: _Auth = "kubernetes") -> None:
    """Serve the event store of one PostgreSQL database over HTTP."""
    from refold.eventstore.server import main
    from refold.query import state

    _run(partial(main, auth, state.operations))


@app.command(rich_help_panel=_PROCESSES)
def relay() -> None:
    """Carry events from the event store to Kafka, exactly once and in order."""
    from refold.relay.main import main

    _run(main)


@app.command(rich_help_panel=_PROCESSES)
def projector() -> None:
    """Fold one version of a Projection from Kafka (and the event store) into its read store."""
    from refold.projection.main import main

    _run(main)


@app.command(rich_help_panel=_PROCESSES)
def query(auth: _Auth = "kubernetes") -> None:
    """Serve one Projection's read model over HTTP."""
    from refold.query.server import main

    _run(partial(main, auth))


@app.command(rich_help_panel=_PROCESSES)
def operator() -> None:
    """Reconcile EventStreams and Projections (needs a Kubernetes cluster)."""
    from refold_operator.main import main

    _run(main)


@app.command(rich_help_panel=_PROCESSES)
def webhook() -> None:
    """Answer the API server whether EventStreams and Projections can work, before it stores them."""
    from refold_operator.webhook.main import main

    _run(main)


app.add_typer(people.parked, name="parked")
app.command()(people.log)
app.command()(people.state)
app.command()(people.rebuild)
