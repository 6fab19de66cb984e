"""The command line: `tinydiff generate`, `serve`, `models`, `plan` and so on, a record of options each.

torch is imported only after everything that needs no model has been checked.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinydiff import advise, command_line, config, describe, doctor, flags, paths, printing, unsupported
from tinydiff.command_line import Command
from tinydiff.models import registry
from tinydiff.records import RankError, UserError, nearest
from tinydiff.runtime import launch
from tinydiff.serve import server
from tinydiff.serve.options import Serve
from tinydiff.values import positional
from tinydiff.version import __version__

if TYPE_CHECKING:
    from tinydiff.records import Result

ABOUT = """\
Images and videos from diffusion models.

  tinydiff generate --prompt "a large red circle on a white background"
  tinydiff generate --prompt "a green star moving right" --num-frames 17
  tinydiff generate --model-path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a fox in the snow"

`tinydiff COMMAND --help` lists the options of a command, `tinydiff --version` says the version.
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
    """Run one command and return its exit code. Every failure prints one sentence.

    0: success, also if the reader of the output closed it early. 1: `doctor` found a difference, a rank
    failed, or the output could not be printed in full (files are written by then). 2: a user's mistake. 130:
    interrupted.
    """
    with printing.safe_streams() as out:
        code = _run_or_explain(list(sys.argv[1:] if argv is None else argv))
        if (reason := printing.failure(out)) and not code:
            sentence = f"not everything could be printed ({reason}); the work itself is done"
            print(f"tinydiff: error: {sentence}", file=sys.stderr)
            return 1
    return code


def _run_or_explain(argv: list[str]) -> int:
    try:
        return _run(argv)
    except (UserError, RankError) as error:
        launch.wait_unless_first_to_fail()
        print(f"tinydiff: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("tinydiff: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    match argv:
        case [] | ["-h" | "--help", *_]:
            command_line.show(COMMANDS, ABOUT, ["--help"])
            return 0
        case ["--version" | "version"]:
            print(f"tinydiff {__version__}")
            return 0
        case [word, *_] if word not in COMMANDS:
            hint = nearest(word, [*COMMANDS, "--help", "--version"])
            raise UserError("command", f"{word}: no such command{hint}; `tinydiff --help` lists them")
    command = COMMANDS[argv[0]]
    if {"-h", "--help"} & set(argv):
        command_line.show(COMMANDS, ABOUT, [argv[0], "--help"])
        print(command.epilogue, end="")
        return 0
    return command.run(command_line.chosen(COMMANDS, argv))


def _generate(asked: config.Options) -> int:
    options = config.checked(asked)
    _check_without_torch(options)
    launch.log_to_stderr(options.output.log_level)
    for name in options.ignored:
        flag = name.replace("_", "-")
        print(f"tinydiff: --{flag} is a server option and is ignored here", file=sys.stderr)

    from tinydiff import progress

    started = datetime.now(UTC)
    results = launch.generate(options, progress.watch)
    for result in results:
        print(_report(result))
    if options.output.perf_dump_path is not None and results:
        _dump(paths.path(options.output.perf_dump_path, "perf_dump_path"), results[0], started)
    return 0


def _check_without_torch(options: config.Options) -> None:
    """Refuse what can be refused before torch is imported."""
    if options.refusals:
        raise UserError("options", options.refusals[0])
    row = registry.find(options.model.model_id or options.model.model_path)
    if not options.sampling.prompt and not (row and row.captions):
        raise UserError("prompt", "prompt: is missing; describe the output with --prompt 'a red circle'")
    if options.model.model_id is not None:
        registry.named(options.model.model_id)
    from tinydiff.io.output import check_writable

    if options.output.save_output:
        check_writable(paths.path(options.output.output_path, "output_path"))
    if options.output.perf_dump_path is not None:
        path = paths.path(options.output.perf_dump_path, "perf_dump_path")
        if (kind := paths.kind(path)) not in ("file", ""):
            what = "a directory" if kind == "directory" else "a device or a pipe"
            raise UserError("perf_dump_path", f"perf_dump_path: {str(path)!r} is {what}; give a file name")
        check_writable(path.parent, path.name, "perf_dump_path")


def _report(result: Result) -> str:
    """The files and their seeds, a rewritten prompt, warnings, and the seconds of each stage."""
    seeds = [f"seed {seed}" for seed in result.seeds]
    files_per_seed = len(result.paths) // len(seeds)  # a layered image is several files
    lines = [f"{path}  {seeds[i // files_per_seed]}" for i, path in enumerate(result.paths)]
    lines = lines or [f"not saved: {', '.join(seeds)}"]
    if "revised_prompt" in result.parameters:
        lines.append(f"prompt as rewritten: {result.parameters['revised_prompt']}")
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join([*lines, ", ".join(f"{stage} {s:.2f} s" for stage, s in result.seconds.items())])


def _dump(path: Path, result: Result, started: datetime) -> None:
    """Write the timings of a result as JSON, under the names of SGLang Diffusion's --perf-dump-path."""
    from tinydiff.io.atomic import write_over

    stages, steps = result.seconds.items(), enumerate(result.step_seconds)
    record = {
        "timestamp": started.isoformat(),
        "total_duration_ms": 1000 * sum(result.seconds.values()),
        "steps": [{"name": stage, "duration_ms": 1000 * seconds} for stage, seconds in stages],
        "denoise_steps_ms": [{"step": step, "duration_ms": 1000 * seconds} for step, seconds in steps],
        "meta": {"version": __version__, "parameters": dict(result.parameters)},
    }
    text = json.dumps(record, indent=2, default=str) + "\n"
    write_over(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class ModelsOptions:
    """How the list is printed."""

    json: bool = False
    """Print JSON."""


def _models(options: ModelsOptions) -> int:
    if options.json:
        print(json.dumps([asdict(row) for row in registry.MODELS], indent=2, ensure_ascii=False))
    else:
        print("\n".join(_table()))
    return 0


COLUMNS = ["model", "size", "frames", "fps", "steps", "guidance", "shift", "solver", "images", "parameters"]


def _table() -> list[str]:
    rows = [COLUMNS, *map(_cells, registry.MODELS)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _cells(row: registry.ReleasedModel) -> list[str]:
    several = row.video_frames != row.num_frames
    fewest, most = row.images
    return [
        row.name,
        f"{row.width}x{row.height}",
        f"{row.num_frames} or {row.video_frames}" if several else f"{row.num_frames}",
        str(row.fps),
        str(row.steps),
        f"{row.guidance:g}" if row.guidance_2 is None else f"{row.guidance:g}, {row.guidance_2:g}",
        "from scheduler" if row.flow_shift is None else f"{row.flow_shift:g}",
        row.solver,
        f"{fewest} to {most}" if fewest < most else f"{most}",
        f"{row.params / 1e9:.1f} B" if row.params >= 1e8 else f"{row.params / 1e6:.1f} M",
    ]


@dataclass(frozen=True)
class CompletionOptions:
    """For which shell the script is."""

    shell: Literal["bash", "zsh", "fish", "tcsh"] = positional("bash")
    """The shell. `tinydiff completion bash > FILE`, and read FILE in ~/.bashrc."""


def _completion(options: CompletionOptions) -> int:
    command_line.show(COMMANDS, ABOUT, ["--tyro-print-completion", options.shell])
    return 0


def _tool(record: type, description: str, run: Callable[[Any], int]) -> Command:
    """A command that runs no model."""

    def normalise(argv: Sequence[str]) -> tuple[Any, list[str]]:
        return record(), command_line.words(record, flags.of_tool(argv, record))

    return Command(record, description, normalise, run)


COMMANDS = {
    "generate": Command(
        config.Options,
        "Make images or videos and write them to files.",
        config.normalise,
        _generate,
        EPILOGUE + textwrap.fill(f"Not supported yet: {', '.join(unsupported.FEATURES)}.", 105) + "\n",
    ),
    "serve": Command(
        Serve,
        "Serve a model over HTTP: OpenAI's image and video API, a web page, metrics.",
        server.normalise,
        server.serve,
        SERVING,
    ),
    "models": _tool(ModelsOptions, "List the supported models and their defaults.", _models),
    "plan": _tool(
        advise.PlanOptions,
        "Estimate memory and time of a model on one or several GPUs, from its configs alone.",
        advise.run,
    ),
    "inspect": _tool(
        describe.InspectOptions,
        "Say what a file or directory is, what is missing and which command runs it.",
        describe.run,
    ),
    "doctor": _tool(
        doctor.DoctorOptions,
        "Show what this machine can run; --parity compares the networks with diffusers.",
        doctor.run,
    ),
    "completion": _tool(CompletionOptions, "Print the completions of a shell.", _completion),
}


if __name__ == "__main__":
    sys.exit(main())
