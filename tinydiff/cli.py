"""The command line: `tinydiff generate`, `tinydiff models`, `tinydiff doctor`, `tinydiff plan`, `tinydiff
--version`.

Help is drawn by tyro from the option records. Values are read by `config.parse`, the one reader that files,
library calls and the command line share. torch is imported only once everything that needs no model has been
checked.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, make_dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tinydiff import __version__, config, paths, printing, unsupported
from tinydiff.models import registry
from tinydiff.records import RankError, UserError, nearest
from tinydiff.runtime import launch

if TYPE_CHECKING:
    from tinydiff.records import Result

SUMMARY = """\
usage: tinydiff COMMAND ...

Images and videos from diffusion models.

  tinydiff generate --prompt "a large red circle on a white background"
  tinydiff generate --prompt "a green star moving right" --num-frames 17
  tinydiff generate --model-path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a fox in the snow"

commands:
  generate    make images or videos and write them to files
  models      list the supported models with their defaults (--json)
  doctor      show what runs here; --parity compares the networks with diffusers'
  plan        what each way of sharing a request among several GPUs costs
  serve       the same over HTTP: OpenAI's images and videos, a page, metrics

  -h, --help  show this, or after a command its options
  --version   show the version
"""

SPELLING = """\
Flags may be written with dashes or underscores. A switch is --flag, --flag true or --flag false.
--config FILE reads options from a JSON or YAML file; the command line overrides it.
"""

EPILOGUE = f"""\
{SPELLING}An option that is left out gets the model's own default; `tinydiff models` lists them.

Every other flag of SGLang Diffusion is recognised. Server flags (--host, --port, ...) are ignored with a
note. A flag of an unsupported feature is accepted only with the value that turns the feature off.
"""

SERVING = f"""\
{SPELLING}
Object storage is configured by environment variables: TINYDIFF_CLOUD_STORAGE_TYPE=s3,
TINYDIFF_S3_BUCKET_NAME, TINYDIFF_S3_ACCESS_KEY_ID, TINYDIFF_S3_SECRET_ACCESS_KEY and
TINYDIFF_S3_ENDPOINT_URL. The prefix SGLANG_ works too.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 when it did; also where the reader of what is printed left early. 1 where `doctor` found a difference, a
    rank failed, or not all could be printed; files are written by then. 2 for a user's mistake, 130 when
    interrupted. Every failure is told in one sentence.
    """
    with printing.steady() as out:
        code = _told(list(sys.argv[1:] if argv is None else argv))
        if (reason := printing.lost(out)) and not code:
            print(
                f"tinydiff: error: not all could be printed ({reason}); the work itself is done",
                file=sys.stderr,
            )
            return 1
    return code


def _told(argv: list[str]) -> int:
    """Run one command, and tell its failure."""
    try:
        return _run(argv)
    except (UserError, RankError) as error:
        launch.let_first_speak()
        print(f"tinydiff: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("tinydiff: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    match argv:
        case [] | ["-h" | "--help", *_]:
            print(SUMMARY, end="")
        case ["--version" | "version"]:
            print(f"tinydiff {__version__}")
        case ["generate", *rest]:
            _help_of_generate() if {"-h", "--help"} & set(rest) else _generate(rest)
        case ["models", *rest]:
            _models(rest)
        case ["doctor", *rest]:
            from tinydiff import doctor

            return doctor.main(rest)
        case ["plan", *rest]:
            from tinydiff import advise

            return advise.main(rest)
        case ["serve", *rest]:
            if {"-h", "--help"} & set(rest):
                _help_of_serve()
            else:
                from tinydiff.serve import server

                return server.serve(rest)
        case [word, *_]:
            raise UserError(
                "command", f"{word}: no such command{nearest(word, COMMANDS)}; `tinydiff --help` lists them"
            )
    return 0


COMMANDS = ("generate", "models", "doctor", "plan", "serve", "--help", "--version")


def _generate(argv: list[str]) -> None:
    options = config.parse(argv)
    _admissible(options)
    launch.say(options.output.log_level)
    for name in options.ignored:
        print(
            f"tinydiff: --{name.replace('_', '-')} belongs to a server and is ignored here", file=sys.stderr
        )

    from tinydiff import progress

    started = datetime.now(UTC)
    results = launch.generate(options, progress.watch)
    for result in results:
        print(_report(result))
    if options.output.perf_dump_path is not None and results:
        _dump(paths.path(options.output.perf_dump_path, "perf_dump_path"), results[0], started)


def _admissible(options: config.Options) -> None:
    """Refuse what can be refused before torch is imported."""
    if options.refusals:
        raise UserError("options", options.refusals[0])
    row = registry.find(options.model.model_id or options.model.model_path)
    if not options.sampling.prompt and not (row and row.captions):
        raise UserError("prompt", "prompt: none is given; say what to make with --prompt 'a red circle'")
    if options.model.model_id is not None:
        registry.named(options.model.model_id)
    from tinydiff.io.output import check_writable

    if options.output.save_output:
        check_writable(paths.path(options.output.output_path, "output_path"))
    if options.output.perf_dump_path is not None:
        path = paths.path(options.output.perf_dump_path, "perf_dump_path")
        if (kind := paths.kind(path)) not in ("file", ""):
            what = "a directory" if kind == "directory" else "a device or a pipe"
            raise UserError(
                "perf_dump_path", f"perf_dump_path: {str(path)!r} is {what}; it must be a file's name"
            )
        check_writable(path.parent, path.name, "perf_dump_path")


def _report(result: Result) -> str:
    """The paths with their seeds, the prompt where the model wrote it, what had no effect, then the seconds
    of each stage.
    """
    seeds = [f"seed {seed}" for seed in result.seeds]
    each = len(result.paths) // len(seeds)  # layers are files of their own
    saved = [f"{path}  {seeds[i // each]}" for i, path in enumerate(result.paths)]
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.seconds.items())
    revised = (
        [f"prompt as rewritten: {result.parameters['revised_prompt']}"]
        if "revised_prompt" in result.parameters
        else []
    )
    warnings = [f"warning: {said}" for said in result.warnings]
    return "\n".join([*(saved or [f"not saved: {', '.join(seeds)}"]), *revised, *warnings, stages])


def _dump(path: Path, result: Result, started: datetime) -> None:
    """Write the timings of the first result as JSON, under the names that SGLang Diffusion's --perf-dump-path
    uses.
    """
    from tinydiff.io.atomic import write_over

    total = sum(result.seconds.values())
    record = {
        "timestamp": started.isoformat(),
        "total_duration_ms": 1000 * total,
        "steps": [
            {"name": stage, "duration_ms": 1000 * seconds} for stage, seconds in result.seconds.items()
        ],
        "denoise_steps_ms": [
            {"step": step, "duration_ms": 1000 * seconds} for step, seconds in enumerate(result.step_seconds)
        ],
        "meta": {"version": __version__, "parameters": dict(result.parameters)},
    }
    text = json.dumps(record, indent=2, default=str) + "\n"
    write_over(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _models(argv: list[str]) -> None:
    if argv in (["-h"], ["--help"]):
        print("usage: tinydiff models [--json]\n\nList the supported models with their defaults.")
    elif argv == ["--json"]:
        print(json.dumps([asdict(row) for row in registry.MODELS], indent=2, ensure_ascii=False))
    elif argv:
        raise UserError("models", f"models: unexpected {argv[0]!r}; it takes --json or nothing")
    else:
        print("\n".join(_table()))


def _table() -> list[str]:
    rows = [
        ("model", "size", "frames", "fps", "steps", "guidance", "shift", "solver", "pictures", "parameters")
    ]
    for row in registry.MODELS:
        frames = (
            f"{row.num_frames}"
            if row.clip_frames == row.num_frames
            else f"{row.num_frames} or {row.clip_frames}"
        )
        guidance = f"{row.guidance:g}" if row.guidance_2 is None else f"{row.guidance:g}, {row.guidance_2:g}"
        params = f"{row.params / 1e9:.1f} B" if row.params >= 1e8 else f"{row.params / 1e6:.1f} M"
        size = f"{row.width}x{row.height}"
        shift = "its own" if row.flow_shift is None else f"{row.flow_shift:g}"
        least, most = row.images
        pictures = f"{least} to {most}" if least < most else f"{most}"
        rows.append(
            (
                row.name,
                size,
                frames,
                str(row.fps),
                str(row.steps),
                guidance,
                shift,
                row.solver,
                pictures,
                params,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _help_of_generate() -> None:
    boxes: dict[str, type] = dict(zip(("picture", "file", "model", "ranks"), config.GROUPS, strict=True))
    missing = textwrap.fill("Not supported yet: " + ", ".join(unsupported.FEATURES) + ".", 105)
    _help("generate", "Make images or videos and write them to files.", boxes, f"{EPILOGUE}{missing}\n")


def _help_of_serve() -> None:
    from tinydiff.serve.options import ServeOptions

    boxes = {"server": ServeOptions, "model": config.ModelOptions}
    _help("serve", "Keep a model loaded behind an OpenAI-compatible HTTP API, and a page.", boxes, SERVING)


def _help(command: str, description: str, groups: Mapping[str, type], epilogue: str) -> None:
    """Draw a command's options: one box per record."""
    import tyro

    def hint(default: str) -> str:
        return (
            ""
            if default in ("", "None")
            else f"(default: {default.lower() if default in ('True', 'False') else default})"
        )

    def drawn(group: type) -> type:
        rows = [
            (
                entry.name,
                Annotated[kind, tyro.conf.arg(metavar=_metavar(kind), help_behavior_hint=hint)],
                entry,
            )
            for entry, kind in zip(fields(group), get_type_hints(group).values(), strict=True)
        ]
        return make_dataclass(group.__name__, rows, bases=(group,), frozen=True)

    boxes = [
        (name, group, field(default_factory=group))
        for name, group in ((name, drawn(group)) for name, group in groups.items())
    ]
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    shown = make_dataclass("Options", boxes, frozen=True)
    try:
        tyro.cli(shown, prog=f"tinydiff {command}", description=description, args=["--help"], config=markers)
    except SystemExit:
        print(epilogue, end="")


def _metavar(kind: Any) -> str:
    """How help writes the values of an annotated type."""
    origin, inner = get_origin(kind), [k for k in get_args(kind) if k is not NoneType]
    if origin is Literal:
        return "|".join(get_args(kind))
    if origin is tuple:
        return f"{_metavar(inner[0])} ..."
    if origin in (Union, UnionType):
        return _metavar(inner[0])
    return "COMPONENT=..." if origin else {bool: "[true|false]", str: "TEXT", int: "N", float: "X"}[kind]


if __name__ == "__main__":
    sys.exit(main())
