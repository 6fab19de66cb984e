"""The WSGI app: all routes of the server, behind the guard."""

from __future__ import annotations

import falcon

from tinydiff.serve import errors, images, info, lora_routes, openapi, pages, videos
from tinydiff.serve.guard import EXPOSED, Guard
from tinydiff.serve.service import Service

RESOURCES = (images, videos, info, lora_routes, openapi, pages)
"""Modules with a function `routes`."""


def make_app(service: Service) -> falcon.App:
    """The WSGI app of a running server."""
    origins = service.options.cors_origin
    allowed = "*" if "*" in origins else origins
    cors = [falcon.CORSMiddleware(allowed, expose_headers=EXPOSED)] if origins else []
    app = falcon.App(middleware=[*cors, Guard(service)])
    app.req_options.strip_url_path_trailing_slash = True
    app.req_options.auto_parse_qs_csv = False
    errors.install(app)
    for module in RESOURCES:
        for route, resource in module.routes(service):
            if hasattr(resource, "on_get") and not hasattr(resource, "on_head"):
                resource.on_head = resource.on_get  # falcon omits the body
            app.add_route(route, resource)
    return app
