"""tyro's part: words in one spelling become records, defaults are overridden, mistakes pass through
unchanged.
"""

from __future__ import annotations

import random
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from tinydiff import cli, command_line, config, values
from tinydiff.records import UserError
from tinydiff.serve import server

COMMANDS = (Path(__file__).parent / "data" / "sglang_commands.txt").read_text().splitlines()


@pytest.mark.parametrize(
    "prompt",
    ["", " ", "-x", "--height", "--", "-1", "a\nb", "\0", "\udcff", '["a"]', "None", "generate", "="],
)
def test_every_word_arrives_as_it_is(prompt):
    words = command_line.words(config.Options, {"prompt": [prompt, "b"], "output_file_name": prompt})
    if prompt == "\udcff":  # no text: only a path may have such bytes
        with pytest.raises(UserError, match=r"^prompt: .* not UTF-8"):
            command_line.read(config.Options, config.Options(), words)
        return
    made = command_line.read(config.Options, config.Options(), words)
    assert (made.sampling.prompt, made.output.output_file_name) == ((prompt, "b"), prompt)


def test_what_is_left_out_is_as_in_the_defaults():
    given = {"seed": 3, "component_paths": {"vae": "a", "transformer": "b"}, "tp_size": 2, "fps": 9}
    defaults = config.options({**given, "quantization_rank": 32, "port": 1})
    assert command_line.read(config.Options, defaults, []) == defaults
    words = command_line.words(config.Options, {"fps": ["8"], "component_paths": {"vae": "c"}})
    made = command_line.read(config.Options, defaults, words)
    assert (made.sampling.fps, made.sampling.seed, made.parallel.tp_size) == (8, (3,), 2)
    assert made.model.component_paths == {"vae": "c", "transformer": "b"}
    assert (made.refusals, made.ignored) == (defaults.refusals, defaults.ignored) != ((), ())


def test_the_command_is_chosen_and_its_record_filled():
    made = command_line.chosen(cli.COMMANDS, ["generate", "--prompt", "a", "--720p"])
    assert made == config.parse(["--prompt", "a", "--720p"]) and made.sampling.height == 720
    made = command_line.chosen(cli.COMMANDS, ["serve", "some/model", "--port", "1", "--log-level", "error"])
    assert (made.model.model_path, made.server.port, made.log_level) == ("some/model", 1, "error")
    with pytest.raises(UserError, match=r"^port: 'x' is not an integer$") as caught:
        command_line.chosen(cli.COMMANDS, ["serve", "--port", "x"])
    assert caught.value.field == "port"


def test_a_file_gives_the_server_its_defaults(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("port: 1\nmax_queue: 3\ncomponent_paths: {vae: a, transformer: b}\nlog_level: error\n")
    made = server.parse(["--config", str(path), "--port", "2", "--vae-path", "c"])
    assert (made.server.port, made.server.max_queue, made.log_level) == (2, 3, "error")
    assert made.model.component_paths == {"vae": "c", "transformer": "b"}


ODD = ["", "-", "--", "-x", "--=", "=", "a", "--json", "true", "--json=maybe", "--no-such", "--size=1x"]
ODD += ["--vram", "--parity", "--model", "--path=a", "--config", "\udcff", "\0", "--\n", "--720p", "9" * 500]


@pytest.mark.parametrize("name", ["models", "plan", "inspect", "doctor", "completion"])
def test_odd_words_of_a_tool_are_its_options_or_one_sentence(name):
    rng, refused = random.Random(name), 0
    for _ in range(40):
        argv = rng.choices(ODD, k=rng.choice([1, 1, 2, 3]))
        try:
            assert isinstance(command_line.chosen(cli.COMMANDS, [name, *argv]), cli.COMMANDS[name].record)
        except UserError as error:
            assert "\n" not in str(error) and 5 < len(str(error)) < 1000, argv
            refused += 1
    assert refused > 10


def records(record):
    yield record
    for _, kind in values.options_of(record):
        if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
            yield from records(kind)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_has_a_description_and_is_in_the_help(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    for record in records(cli.COMMANDS[name].record):
        for entry, kind in values.options_of(record):
            if not hasattr(kind, "__dataclass_fields__"):
                place = entry.name.upper() if values.is_positional(entry) else entry.name.replace("_", "-")
                assert place in shown and values.descriptions(record)[entry.name]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_description_stands_alone(name):
    for record in records(cli.COMMANDS[name].record):
        for field, text in values.descriptions(record).items():
            leans = re.match(r"The same\b|Which of|Of them|Those\b|Which blocks those", text)
            assert leans is None and not re.search(r"\bin this way\b|\bthat pass\b", text), (field, text)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_know_every_command_and_option(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    names = {entry.name for group in config.GROUPS for entry in fields(group)}
    for name in [*cli.COMMANDS, *names]:
        assert name.replace("_", "-") in script, name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_sglangs_page_are_understood(command, tmp_path):
    for name in ("config.yaml", "wan_s2v.yaml"):
        (tmp_path / name).write_text("prompt: a\n")
    _, name, *argv = [word.replace("TMP", str(tmp_path)) for word in shlex.split(command)]
    try:
        made = command_line.chosen(cli.COMMANDS, [name, *argv])
    except UserError as error:
        assert "not supported yet" in str(error) or "so far" in str(error)
    else:
        assert isinstance(made, cli.COMMANDS[name].record)
