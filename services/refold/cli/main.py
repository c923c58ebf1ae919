"""The `refold` command: one entry point for every process and for people.

Each process is imported only when it is asked for, so that `refold --help` is quick and the data plane never
loads the operator.
"""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Refold: event sourcing and CQRS on Kubernetes.")


@app.command()
def eventstore() -> None:
    """Serve the event store of one PostgreSQL database over HTTP."""
    from refold.eventstore.server import main

    main()


@app.command()
def relay() -> None:
    """Carry events from the event store to Kafka, exactly once and in order."""
    from refold.relay.main import main

    main()


@app.command()
def projector() -> None:
    """Fold one version of a Projection from Kafka (and the event store) into its read store."""
    from refold.projection.main import main

    main()


@app.command()
def query() -> None:
    """Serve one Projection's read model over HTTP."""
    from refold.query.server import main

    main()


@app.command()
def operator() -> None:
    """Reconcile EventStreams and Projections (needs a Kubernetes cluster)."""
    from refold_operator.main import main

    main()
