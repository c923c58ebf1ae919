"""Commands for people: parked events, rows as they were, and the history of a subject.

Each ends with exit code 0 where all that was asked is done, 1 where a service refused or there is no way to it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from refold.cli import rebuilding, shown, states
from refold.cli.reach import RefusedError, UnreachableError, Way
from refold.cli.shown import Output

#: Parked events of one request.
_PAGE = 1000

_Projection = Annotated[str, typer.Argument(help="Name of the Projection.")]
_Ids = Annotated[list[int], typer.Argument(help="As `refold parked list` shows them.")]
_Version = Annotated[str | None, typer.Option(help="The version that they are of; without, the live one.")]
_Output = Annotated[Output, typer.Option("--output", "-o", help="table, or json for programs.")]
_Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Of the resource; without, the kubeconfig's, else default.")
]
_Context = Annotated[str | None, typer.Option(help="Of the kubeconfig; without, the current one.")]
_ServiceAccount = Annotated[
    str | None,
    typer.Option(
        envvar="REFOLD_SERVICE_ACCOUNT",
        help="Of the namespace: its token is made and sent. It needs the rights that docs/authorisation.md tells.",
    ),
]
_Url = Annotated[
    str | None, typer.Option(envvar="REFOLD_URL", help="Of the service, to reach it without the Kubernetes API.")
]
_TokenFile = Annotated[
    Path | None,
    typer.Option(envvar="REFOLD_TOKEN_FILE", help="Holds the token to send; or the variable REFOLD_TOKEN does."),
]
_SystemNamespace = Annotated[
    str, typer.Option(envvar="REFOLD_SYSTEM_NAMESPACE", help="Where Refold is installed, with its event store.")
]
#: Not on the command line, which others on the machine can read.
_Token = Annotated[str | None, typer.Option(envvar="REFOLD_TOKEN", hidden=True, parser=str)]

parked = typer.Typer(no_args_is_help=True, help="Events that a Projection's projector has parked.")


@contextmanager
def _told() -> Iterator[None]:
    """Say what is wrong in a line, and end with exit code 1."""
    try:
        yield
    except (UnreachableError, RefusedError) as error:
        print(f"error: {shown.printable(str(error))}", file=sys.stderr)
        raise typer.Exit(1) from error


@parked.command("list")
def list_(
    projection: _Projection,
    key: Annotated[str | None, typer.Option(help="Only of the row with this key.")] = None,
    version: _Version = None,
    output: _Output = Output.TABLE,
    namespace: _Namespace = None,
    context: _Context = None,
    service_account: _ServiceAccount = None,
    url: _Url = None,
    token_file: _TokenFile = None,
    token: _Token = None,
) -> None:
    """Show which events are parked, and why."""
    with _told():
        client = _way(url, token, token_file, context, namespace, service_account).to_query(projection)
        found: list[dict[str, Any]] = []
        after: int | None = 0
        while after is not None:
            page = client.ask(
                "GET", "v1", "parked", query={"key": key, "version": version, "after": after, "limit": _PAGE}
            )
            # All of one version, also where another one goes live meanwhile.
            version = page["version"]
            found += page["parked"]
            after = page["next"]
    if output is Output.JSON:
        shown.as_json({"version": version, "parked": found})
        return
    shown.as_table(
        ["ID", "KEY", "SUBJECT", "STREAM", "PARTITION", "POSITION", "PARKED", "ERROR"],
        (
            (
                one["id"], one["key"], one["subject"], one["stream"], one["partition"], one["position"],
                one["parkedAt"], one["error"],
            )
            for one in found
        ),
    )  # fmt: skip


@parked.command()
def retry(
    projection: _Projection,
    ids: _Ids,
    version: _Version = None,
    output: _Output = Output.TABLE,
    namespace: _Namespace = None,
    context: _Context = None,
    service_account: _ServiceAccount = None,
    url: _Url = None,
    token_file: _TokenFile = None,
    token: _Token = None,
) -> None:
    """Fold parked events again, each with those of its row that come before it."""
    with _told():
        client = _way(url, token, token_file, context, namespace, service_account).to_query(projection)
        _settle(client, "retry", ids, version, output)


@parked.command()
def discard(
    projection: _Projection,
    ids: _Ids,
    version: _Version = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask whether that is meant.")] = False,
    output: _Output = Output.TABLE,
    namespace: _Namespace = None,
    context: _Context = None,
    service_account: _ServiceAccount = None,
    url: _Url = None,
    token_file: _TokenFile = None,
    token: _Token = None,
) -> None:
    """Have parked events never take effect, and fold those behind them again."""
    if not yes:
        listed = ", ".join(map(str, ids))
        typer.confirm(
            f"Discard {listed} for good? The row goes on without what they would do to it", abort=True, err=True
        )
    with _told():
        client = _way(url, token, token_file, context, namespace, service_account).to_query(projection)
        _settle(client, "discard", ids, version, output)


def log(
    stream: Annotated[str, typer.Argument(help="Name of the EventStream.")],
    subject: Annotated[str, typer.Argument(help="Whose events.")],
    limit: Annotated[int | None, typer.Option(min=1, help="How many at most; without, all.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="The latest first.")] = False,
    until: Annotated[str | None, typer.Option(help="Only up to this time (RFC 3339).")] = None,
    projection: Annotated[
        str | None,
        typer.Option(help="Show too what each event did to the row that this Projection makes of the subject."),
    ] = None,
    output: _Output = Output.TABLE,
    namespace: _Namespace = None,
    context: _Context = None,
    service_account: _ServiceAccount = None,
    system_namespace: _SystemNamespace = "refold-system",
    url: _Url = None,
    token_file: _TokenFile = None,
    token: _Token = None,
) -> None:
    """Show the history of a subject."""
    with _told():
        way = _way(url, token, token_file, context, namespace, service_account, system_namespace)
        query = {"limit": limit, "until": until, "direction": "backward" if reverse else None}
        path = ("v1", "streams", way.in_namespace(), stream, "subjects", subject)
        client = way.to_event_store()
        found = client.ask("GET", *path, "events", query=query)
        if projection is not None:
            found["state"] = states.of_events(client, path, found["events"], projection)
    if output is Output.JSON:
        shown.as_json(found)
        return
    columns, steps = ["REVISION", "TIME", "TYPE", "ID", "DATA"], {}
    if projection is not None:
        columns += ["EFFECT", "CHANGES"]
        steps = {one["revision"]: one for one in (found["state"] or {"steps": []})["steps"]}
    shown.as_table(
        columns,
        (
            (
                one["revision"], one["time"], one["type"], one["id"], one["data"],
                *(states.differences(steps.get(one["revision"])) if projection is not None else ()),
            )
            for one in found["events"]
        ),
    )  # fmt: skip


def state(
    projection: _Projection,
    key: Annotated[str, typer.Argument(help="Of the row.")],
    at: Annotated[
        str | None, typer.Option(help="As it was then: a revision of its subject, or a time (RFC 3339).")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=states.MOST_STEPS, help="Of how many of the last events to show what each did.")
    ] = 100,
    output: _Output = Output.TABLE,
    namespace: _Namespace = None,
    context: _Context = None,
    service_account: _ServiceAccount = None,
    url: _Url = None,
    token_file: _TokenFile = None,
    token: _Token = None,
) -> None:
    """Show a row as it is or was, and what each event did to it."""
    with _told():
        client = _way(url, token, token_file, context, namespace, service_account).to_query(projection)
        found = states.of_row(client, key, at, steps)
    if output is Output.JSON:
        shown.as_json(found)
    else:
        states.show(found)


def rebuild(
    projection: _Projection,
    wait: Annotated[bool, typer.Option(help="Show how far it is until readers see it.")] = True,
    namespace: _Namespace = None,
    context: _Context = None,
) -> None:
    """Build a read model anew from the same definition; the live version serves meanwhile."""
    with _told():
        if not rebuilding.rebuild(_way(None, None, None, context, namespace, None), projection, wait=wait):
            raise typer.Exit(1)


def _settle(client: Any, verb: str, ids: list[int], version: str | None, output: Output) -> None:
    """Do what is asked of each; the others too where one is refused, which the exit code then tells."""
    outcomes: list[dict[str, Any]] = []
    for id_ in ids:
        try:
            outcomes.append(client.ask("POST", "v1", "parked", f"{id_}:{verb}", query={"version": version}))
        except RefusedError as error:
            outcomes.append({"id": id_, "outcome": error.kind, "error": str(error)})
    if output is Output.JSON:
        shown.as_json(outcomes)
    else:
        shown.as_table(
            ["ID", "OUTCOME", "ERROR"], ((one["id"], one["outcome"], one.get("error", "")) for one in outcomes)
        )
    if any("error" in one for one in outcomes):
        raise typer.Exit(1)


def _way(
    url: str | None,
    token: str | None,
    token_file: Path | None,
    context: str | None,
    namespace: str | None,
    service_account: str | None,
    system_namespace: str = "",
) -> Way:
    return Way(
        url=url,
        token=token,
        token_file=token_file,
        context=context,
        namespace=namespace,
        service_account=service_account,
        system_namespace=system_namespace,
    )
