"""Routes about the server: its model, health, metrics, sleep and wake, by OpenAI's and SGLang's names."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import falcon

from tinydiff.records import UserError
from tinydiff.serve.admission import of_model
from tinydiff.serve.body import parse_json, read_bytes
from tinydiff.serve.errors import NO_RETRY, Refusal, of_exception
from tinydiff.serve.jobs import Busy
from tinydiff.serve.metrics import CONTENT_TYPE
from tinydiff.serve.service import Service
from tinydiff.version import __version__

ABLE = ("ready", "asleep")
"""Phases in which a request can start; it wakes a server that is asleep."""

SECRET = ("api_key", "api_key_file", "admin_api_key", "state_dir", "output_path", "state_url")
"""Options that are not shown to clients: secrets and paths."""

CHECK_S = 2.0
"""Seconds that a probe waits for the store."""

LEAST_FREE = 2**24
"""Free bytes on the disk that a new job needs."""

MOST_ADMIN_BODY = 2**16
"""Bytes of the body of an administrator's request."""

Req = falcon.Request
Resp = falcon.Response


def routes(service: Service) -> list[tuple[str, object]]:
    """(route, resource) of each."""
    sleep, wake = Sleep(service), Wake(service)
    storage, figures = Probe(partial(_storage, service)), Probe(lambda: service.scheduler.figures())
    return [
        ("/v1/models", Models(service)),
        ("/v1/models/{id:path}", Model(service)),
        ("/v1/model_info", ModelInfo(service)),
        ("/model_info", ModelInfo(service)),
        ("/models", FlatModel(service)),
        ("/server_info", ServerInfo(service)),
        ("/liveness", Liveness()),
        ("/health", Health(service)),
        ("/health_generate", Health(service)),
        ("/ready", Ready(service, storage)),
        ("/metrics", Scrape(service, figures)),
        ("/release_memory_occupation", sleep),
        ("/v1/sleep", sleep),
        ("/resume_memory_occupation", wake),
        ("/v1/wake", wake),
    ]


def tasks(service: Service) -> list[str]:
    """The tasks of the model by SGLang's names: T2I, I2I, T2V, I2V."""
    row = service.blueprint.row
    least, most = row.images
    makes_videos = row.video_frames > 1
    from_text = (["T2V", "T2I"] if makes_videos else ["T2I"]) if least == 0 else []
    return from_text + ([("I2V" if makes_videos else "I2I")] if most else [])


def precisions(service: Service) -> dict[str, str]:
    """Component -> fp32, fp16 or bf16."""
    return dict(service.blueprint.precisions)


def defaults(service: Service) -> dict[str, object]:
    """The values of fields that a request leaves out."""
    row = service.blueprint.row
    return {
        "width": row.width,
        "height": row.height,
        "num_frames": {"image": row.layers or 1, "video": row.video_frames if row.video_frames > 1 else None},
        "fps": row.fps,
        "num_inference_steps": row.steps,
        "guidance_scale": row.guidance,
        "guidance_scale_2": row.guidance_2,
        "boundary_ratio": row.boundary_ratio,
        "flow_shift": row.flow_shift,
        "negative_prompt": row.negative_prompt,
    }


def card(service: Service) -> dict[str, object]:
    """The model as an entry of /v1/models: OpenAI's members, SGLang's and ours."""
    plan, row = service.blueprint, service.blueprint.row
    made, types = tasks(service), precisions(service)
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "tinydiff",
        "loaded": service.name in service.scheduler.loaded(),
        "root": row.name,
        "parent": None,
        "task_type": made[0]
        if len(made) == 1
        else ("TI2V" if row.video_frames > 1 else "TI2I")
        if row.images[1]
        else made[0],
        "task_types": made,
        "num_gpus": int(plan.device.type == "cuda"),
        "device": plan.device.type,
        "dit_precision": types.get("transformer", types.get("unet")),
        "vae_precision": types.get("vae"),
        "precisions": types,
        "quantization": dict(plan.quantised),
        "pipeline_name": row.family,
        "pipeline_class": row.pipeline,
        "parameters": row.params,
        "defaults": defaults(service),
        "sizes": {
            "default": f"{row.width}x{row.height}",
            "multiple": row.size_multiple,
            "max_pixels": service.options.pixel_limit(row, "image"),
            "max_video_pixels": service.options.pixel_limit(row, "video") if row.video_frames > 1 else None,
            "max_outputs": service.options.max_outputs,
            "frame_multiple": row.frame_multiple if row.video_frames > 1 else None,
        },
        "input_images": {
            "least": row.images[0],
            "most": row.images[1],
            "use": row.image_use if row.images[1] else None,
        },
    }


class Models:
    """OpenAI's list of models, the default one first."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp) -> None:
        cards = [card(replace(self.service, model=model)) for model in self.service.models]
        resp.media = {"object": "list", "data": cards}


class Model:
    """A model by its name, which may contain slashes."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp, id: str) -> None:
        resp.media = card(of_model(self.service, id))


class ModelInfo:
    """The abilities of the model, for SGLang's gateway."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp) -> None:
        row = self.service.blueprint.row
        made = tasks(self.service)
        resp.media = {
            "model_path": row.name,
            "served_model_name": self.service.name,
            "is_generation": True,
            "model_type": "diffusion",
            "architectures": [row.pipeline],
            "supports_image_generation": "T2I" in made or "I2I" in made,
            "supports_video_generation": "T2V" in made or "I2V" in made,
            "supports_image_input": row.images[1] > 0,
        }


class FlatModel:
    """SGLang's older route: the model without a list around it."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp) -> None:
        said = card(self.service)
        names = ("num_gpus", "task_type", "dit_precision", "vae_precision", "pipeline_name", "pipeline_class")
        resp.media = {"model_path": said["root"], **{name: said[name] for name in names}}


class ServerInfo:
    """The server's options without secrets, and its measurements."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp) -> None:
        service, state = self.service, self.service.scheduler.state()
        resp.media = {
            "model_path": service.blueprint.row.name,
            "served_model_name": service.name,
            "models": {model.name: model.name in service.scheduler.loaded() for model in service.models},
            "version": __version__,
            "tp_size": 1,
            "dp_size": 1,
            "phase": state.phase,
            "uptime_s": max(0, int(time.time()) - service.created),
            "options": {name: value for name, value in asdict(service.options).items() if name not in SECRET},
            "figures": service.scheduler.figures(),
        }


class Probe:
    """A call that may block, such as one to the store, made by one thread for all clients at once."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.pool, self.lock = call, ThreadPoolExecutor(1, "probe"), threading.Lock()
        self.pending: Future[Any] | None = None

    def answer(self) -> Any:
        """The result or exception of the call; TimeoutError after CHECK_S."""
        with self.lock:
            if self.pending is None or self.pending.done():
                self.pending = self.pool.submit(self.call)
            pending = self.pending
        return pending.result(CHECK_S)


def _storage(service: Service) -> None:
    """Raise the error that a new job would get from the store or the disk."""
    service.store.check()
    for folder in (service.files.folder, service.files.folder.parent):
        if folder.exists() and shutil.disk_usage(folder).free < LEAST_FREE:
            raise Refusal(507, "storage_failed", "the disk of the server is full")


class Liveness:
    """Whether HTTP is answered."""

    public = True

    def on_get(self, req: Req, resp: Resp) -> None:
        resp.media = {"status": "ok"}

    on_head = on_get


class Health:
    """Whether requests are answered, now or after the warm-up; 503 once the scheduler has failed."""

    public = True

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_get(self, req: Req, resp: Resp) -> None:
        state = self.service.scheduler.state()
        if state.phase == "failed":
            resp.status = falcon.HTTP_503
            resp.media = {"status": "unhealthy", "phase": state.phase, "error": state.detail}
        else:
            resp.media = {"status": "ok", "phase": state.phase}

    on_head = on_get


class Ready:
    """Whether a new request would start at once; if not, the progress or the error of the store."""

    public = True

    def __init__(self, service: Service, storage: Probe) -> None:
        self.service, self.storage = service, storage

    def on_get(self, req: Req, resp: Resp) -> None:
        state = self.service.scheduler.state()
        if state.phase not in ABLE:
            resp.media = {"status": "not ready", **state._asdict()}
            resp.status = falcon.HTTP_503
            if state.eta_s is not None:
                resp.set_header("Retry-After", str(max(1, round(state.eta_s))))
            return
        try:
            self.storage.answer()
            resp.media = {"status": "ok", **state._asdict()}
        except Exception as error:
            refusal = of_exception(error) or Refusal(
                503, "store_unreachable", "the job database does not answer"
            )
            resp.status, resp.media = (
                falcon.HTTP_503,
                {"status": "not ready", **state._asdict(), "detail": refusal.message},
            )

    on_head = on_get


class Scrape:
    """Metrics in Prometheus's text format."""

    public = True

    def __init__(self, service: Service, figures: Probe) -> None:
        self.service, self.figures = service, figures

    def on_get(self, req: Req, resp: Resp) -> None:
        if not self.service.options.enable_metrics:
            raise Refusal(404, "metrics_off", "metrics are off; start the server with --enable-metrics true")
        try:
            figures = self.figures.answer()
            self.service.metrics.jobs(figures.get("queued", 0), figures.get("running", 0))
        except Exception:  # the other metrics do not need the store
            figures = {}
        if (peak := figures.get("peak_memory_bytes")) is not None:
            self.service.metrics.peak_memory(peak)
        resp.data, resp.content_type = self.service.metrics.text(), CONTENT_TYPE


class Sleep:
    """Unloads the weights from the device; the next job loads them again."""

    admin = True

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_post(self, req: Req, resp: Resp) -> None:
        _takes_nothing(req)
        try:
            self.service.scheduler.sleep()
        except Busy as busy:
            message = "the model stays loaded because jobs run or wait; try again when they are done"
            raise Refusal(
                409, "busy", message, headers={"retry-after": str(max(1, round(busy.seconds)))} | NO_RETRY
            ) from None
        resp.media = {"success": True, "message": "the model is being unloaded from the device"}


class Wake:
    """Loads the weights onto the device before the next job needs them."""

    admin = True

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_post(self, req: Req, resp: Resp) -> None:
        _takes_nothing(req)
        self.service.scheduler.wake()
        resp.media = {
            "success": True,
            "message": "the model is being loaded onto the device; /ready reports when it is done",
        }


def _takes_nothing(req: Req) -> None:
    """Check that the body is empty or an empty object. Raises UserError."""
    data = read_bytes(req, MOST_ADMIN_BODY)
    said = parse_json(data, "body") if data.strip() else {}
    if said and isinstance(said, dict):
        name = next(iter(said))
        raise UserError(name, f"{name}: {req.path} has no fields")
    if said != {}:
        raise UserError("body", f"body: must be empty or an empty JSON object for {req.path}")
