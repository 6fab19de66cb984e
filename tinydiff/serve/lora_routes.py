"""SGLang's routes for LoRA adapters: load, activate, deactivate, list (`serve.adapters`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import falcon

from tinydiff.records import UserError, brief, nearest
from tinydiff.serve.admission import of_model
from tinydiff.serve.body import parameters, parse_json, read_bytes
from tinydiff.serve.errors import Refusal
from tinydiff.serve.service import Service

if TYPE_CHECKING:
    from tinydiff.serve.adapters import Adapters

MOST_BYTES = 2**16
"""Bytes of the body of a request here."""


class Loras:
    """The adapters that are loaded."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = _adapters(self.service, parameters(req, ("model",))).listing()


class SetLora:
    """Loads adapters and gives them to every request that names none."""

    admin = True

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = ("lora_nickname", "lora_path", "target", "strength", "merge_mode", "lora_alpha")
        body = _body(req, fields)
        adapters = _adapters(self.service, body)
        if body.get("merge_mode", "auto") not in ("auto", "dynamic"):
            message = (
                "merge_mode: a running server keeps adapters beside the weights; it may be auto or dynamic"
            )
            raise UserError("merge_mode", message)
        names = _several(body, "lora_nickname", str)
        if not names:
            raise UserError("lora_nickname", "lora_nickname: is missing; it names the adapter")
        paths = _for_each(body, "lora_path", str, names)
        targets = _for_each(body, "target", str, names)
        strengths = _for_each(body, "strength", float, names)
        alphas = _for_each(body, "lora_alpha", float, names)
        for name, path, target, alpha in zip(names, paths, targets, alphas, strict=True):
            if path is not None:
                adapters.add(name, path, target, alpha)
        own = (1.0 if strength is None else strength for strength in strengths)
        adapters.activate(dict(zip(names, own, strict=True)))
        resp.media = {
            "status": "ok",
            "message": f"active: {', '.join(names)}",
            **adapters.listing(),
        }


class MergeLora:
    """Gives requests the adapters that were active last."""

    admin = True

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = _body(req, ("target", "strength"))
        _all(body)
        [strength] = _several(body, "strength", float) or [None]
        adapters = _adapters(self.service, body)
        adapters.merge(strength)
        resp.media = {"status": "ok", "message": "the adapters are active", **adapters.listing()}


class UnmergeLora:
    """Gives requests the base model; the adapters stay loaded."""

    admin = True

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = _body(req, ("target",))
        _all(body)
        adapters = _adapters(self.service, body)
        adapters.activate({})
        resp.media = {"status": "ok", "message": "no adapter is active", **adapters.listing()}


def routes(service: Service) -> list[tuple[str, object]]:
    """(path, resource) of each."""
    return [
        ("/v1/set_lora", SetLora(service)),
        ("/v1/merge_lora_weights", MergeLora(service)),
        ("/v1/unmerge_lora_weights", UnmergeLora(service)),
        ("/v1/list_loras", Loras(service)),
    ]


def _adapters(service: Service, given: Mapping[str, Any]) -> Adapters:
    """The adapters of the model that a request names, by default of the first. Raises Refusal."""
    name = given.get("model", "")
    if not isinstance(name, str):
        raise UserError("model", f"model: {brief(name)} is not a string")
    return of_model(service, name).adapters


def _body(req: falcon.Request, own: tuple[str, ...]) -> dict[str, Any]:
    """The body of a request. own: its fields beside `model`."""
    fields = (*own, "model")
    data = read_bytes(req, MOST_BYTES)
    body = parse_json(data, "body") if data.strip() else {}
    if not isinstance(body, dict):
        raise UserError("body", "body: it must be a JSON object")
    for name in body:
        if name not in fields:
            hint = nearest(name, fields)
            message = f"{name[:80]}: no such field; known are {', '.join(fields)}{hint}"
            raise Refusal(400, "unknown_parameter", message, name[:80])
    return {name: value for name, value in body.items() if value is not None}


def _all(body: Mapping[str, Any]) -> None:
    if _several(body, "target", str) not in ([], ["all"]):
        raise UserError("target", "target: an adapter changes what it was loaded for; it may be 'all'")


def _several(body: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """The values of a field that is one or a list of them."""
    value = body.get(name, [])
    values = value if isinstance(value, list) else [value]
    for each in values:
        number = kind is float and isinstance(each, int | float) and not isinstance(each, bool)
        if not (isinstance(each, kind) or number) or (number and not abs(each) <= 100):
            what = "a number from -100 to 100" if kind is float else "a string"
            raise UserError(name, f"{name}: {str(each)[:80]!r} is not {what}, or a list of them")
    return values


def _for_each(body: Mapping[str, Any], name: str, kind: type, names: list[str]) -> list[Any]:
    """One value for each adapter: None where there is none, the same for all where there is one."""
    values = _several(body, name, kind) or [None]
    if len(values) not in (1, len(names)):
        raise UserError(name, f"{name}: {len(values)} are given for {len(names)} adapters")
    return values * len(names) if len(values) == 1 else values
