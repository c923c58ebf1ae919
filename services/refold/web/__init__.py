"""The pieces of HTTP that Refold's services share: plain Starlette routing on uvicorn, with our rules around it.

A service is a list of `openapi.Operation` (what is served and how it is described, in one place), an `App` around it
and `server.run`::

    OPERATIONS = [
        Operation(
            "GET", "/v1/things/{name}", get_thing, summary="A thing by its name",
            parameters=[Parameter(name="name", where="path", description="The thing's name")],
            verb="get", answer={"application/json": Thing}, problems=[404],
        )
    ]

    async def get_thing(request: Request) -> Response:
        name = paths.parameter(request, "name")            # decoded from the raw path: `a%2Fb` is "a/b"
        if name not in things:
            raise Problem(404, "thing-not-found", "No such thing", f"there is no thing {name!r}")
        return Response(msgspec.json.encode(things[name]), media_type="application/json")

    def main() -> None:
        logs.configure("things")
        app = App(
            "Refold things", OPERATIONS, authority=authority(settings.auth), kind="things/parts",
            resource=lambda request: ("shop", paths.parameter(request, "name")), ready=ready, lifespan=lifespan,
        )
        server.run(app, settings.port)

Modules: `problems` (RFC 9457 errors), `paths` (percent-encoded parameters), `bodies` (bounded bodies and NDJSON),
`auth` (who may call), `app` (the ASGI application: routing, errors, metrics, probes), `openapi` (operations and
`/openapi.json`), `server` (uvicorn), `probes` (probes and metrics for processes that serve nothing else).
"""
