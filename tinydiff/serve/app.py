"""The WSGI app: every address of the server, behind the guard."""

from __future__ import annotations

import falcon

from tinydiff.serve import errors, images, info, openapi, pages, videos
from tinydiff.serve.guard import EXPOSED, Guard
from tinydiff.serve.service import Service

PARTS = (images, videos, info, openapi, pages)
"""Modules whose `routes` make the server."""


def make_app(service: Service) -> falcon.App:
    """The app of a running server."""
    origins = service.options.cors_origin
    cors = (
        [falcon.CORSMiddleware("*" if "*" in origins else origins, expose_headers=EXPOSED)] if origins else []
    )
    app = falcon.App(middleware=[*cors, Guard(service)])
    app.req_options.strip_url_path_trailing_slash = True
    app.req_options.auto_parse_qs_csv = False
    errors.install(app)
    for part in PARTS:
        for address, resource in part.routes(service):
            if hasattr(resource, "on_get") and not hasattr(resource, "on_head"):
                resource.on_head = resource.on_get  # falcon leaves the body out
            app.add_route(address, resource)
    return app
