"""What users of the command line rely on: speed, exit statuses, one-line errors, typed options."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import qformers
from qformers import cli
from qformers.cli.command import instance
from qformers.errors import DataError
from qformers.training.config import TrainConfig

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = "output: run\nsteps: 5000\ndata: {train: [{path: pairs.jsonl}]}\n"


def answers_within(seconds: float, *arguments: str) -> bool:
    """Whether one of five fresh interpreters is in time: the others may meet a cold disk or a busy core."""
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        if time.perf_counter() - start < seconds:
            return True
    return False


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs one command line in an empty folder that holds recipe.yaml; gives (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(arguments)
        except SystemExit as stop:  # --help, --version and --print_config
            status = stop.code
        return status, *capsys.readouterr()

    return run


def fail_with(monkeypatch, error: BaseException) -> None:
    def handler(options):
        raise error

    monkeypatch.setitem(cli.COMMANDS, ("demo",), cli.COMMANDS[("demo",)]._replace(run=handler))


@pytest.mark.parametrize("command", [(), *cli.COMMANDS])
def test_help_answers_within_a_second(command):
    line = "import sys; from qformers.cli import main; sys.exit(main())"
    assert answers_within(1.0, "-c", line, *command, "--help")


def test_import_takes_less_than_half_a_second():
    assert answers_within(0.5, "-c", "import qformers")


@pytest.mark.parametrize("command", [*cli.COMMANDS, ("data",), ("evaluate",)])
def test_every_command_explains_itself_with_an_example(command, run):
    status, stdout, stderr = run(*command, "--help")
    assert (status, stderr) == (0, "")
    assert f"usage: qformers {' '.join(command)}" in stdout
    assert f"example:\n  qformers {' '.join(command)}" in stdout


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_imports_nothing_heavy(command):
    line = (
        "import sys\nfrom qformers.cli import main\n"
        "try: main([*sys.argv[1:], '--help'])\n"
        "except SystemExit: sys.exit(' '.join({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", line, *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_one_that_train_takes(recipe, run, monkeypatch):
    taken = []
    monkeypatch.setitem(cli.COMMANDS, ("train",), cli.COMMANDS[("train",)]._replace(run=taken.append))
    assert run("train", str(recipe)) == (0, "", "")
    config = instance(TrainConfig, taken[0])
    assert config.output.startswith("runs/") and (config.stage == 1 or config.start is not None)


@pytest.mark.parametrize("path", list(cli.COMMANDS))
def test_every_example_is_a_command_line_that_parses(path, run, monkeypatch):
    calls = []
    monkeypatch.setitem(cli.COMMANDS, path, cli.COMMANDS[path]._replace(run=calls.append))
    Path("recipes").mkdir()
    Path("recipes/stage1.yaml").write_text(RECIPE)
    program, *arguments = shlex.split(cli.COMMANDS[path].example)
    assert (program, run(*arguments), len(calls)) == ("qformers", (0, "", ""), 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "command"),
        (("dance",), "dance"),
        (("data", "dance"), "dance"),
        (("demo", "--sede", "3"), "--sede"),
        (("demo", "--seed", "three"), "three"),
        (("match", "cat.jpg", "--model", "run"), "texts"),
        (("match", "cat.jpg", "a cat"), "model"),
        (("train",), "recipe"),
        (("train", "recipe.yaml", "--optimiser.lrr", "1"), "--optimiser.lrr"),
        (("train", "recipe.yaml", "--model.preset", "huge"), "huge"),
        (("train", "absent.yaml"), "absent.yaml"),
        (("data", "features", "absent.yaml"), "absent.yaml"),
    ],
)
def test_misuse_is_one_line_that_names_the_culprit(arguments, named, run):
    status, stdout, stderr = run(*arguments)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert named in stderr and "--help" in stderr


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (RECIPE + "stepps: 3\n", "stepps"),
        (RECIPE + "optimiser: {lrr: 3}\n", "lrr"),
        (RECIPE.replace("path:", "paht:"), "paht"),
        (RECIPE + "seed: [\n", "line"),
    ],
)
def test_wrong_recipe_is_one_line_that_names_file_and_key(recipe, named, run):
    Path("recipe.yaml").write_text(recipe)
    status, _, stderr = run("train", "recipe.yaml")
    assert (status, stderr.count("\n")) == (2, 1)
    assert named in stderr and "recipe.yaml" in stderr


def test_setting_out_of_range_is_one_line(run):
    status, stdout, stderr = run("train", "recipe.yaml", "--data.batch_size", "0")
    assert (status, stdout) == (1, "")
    assert stderr == "error: data.batch_size is 0: must be at least 1\n"


def test_print_config_shows_recipe_overrides_and_defaults_and_can_be_run(run):
    status, stdout, _ = run("train", "recipe.yaml", "--optimiser.lr", "0.5", "--print_config")
    shown = yaml.safe_load(stdout)
    assert status == 0
    assert shown["steps"] == 5000 and shown["optimiser"]["lr"] == 0.5
    assert shown["data"]["train"][0]["path"] == "pairs.jsonl"
    assert shown["optimiser"]["betas"] == [0.9, 0.98]

    Path("again.yaml").write_text(stdout)
    assert run("train", "again.yaml", "--print_config") == (0, stdout, "")


def test_train_gets_the_config_that_recipe_and_overrides_make(run, monkeypatch):
    from qformers.data.config import SourceConfig
    from qformers.training import loop
    from qformers.training.config import DataConfig, OptimiserConfig, TrainConfig

    calls = []
    monkeypatch.setattr(loop, "train", lambda config, resume: calls.append((config, resume)))
    assert run("train", "recipe.yaml", "--optimiser.lr", "0.5", "--resume", "auto")[0] == 0
    data = DataConfig(train=[SourceConfig(path="pairs.jsonl")])
    assert calls == [(TrainConfig("run", data, optimiser=OptimiserConfig(lr=0.5), steps=5000), "auto")]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (DataError("cat.jpg is\ncut short"), 1, "error: cat.jpg is cut short\n"),
        (ValueError("odd"), 1, "error: ValueError: odd (run again with --debug for the traceback)\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_failure_is_one_line_with_its_status(error, status, told, run, monkeypatch):
    fail_with(monkeypatch, error)
    assert run("demo") == (status, "", told)


@pytest.mark.parametrize("arguments", [("--debug", "demo"), ("demo", "--debug"), ("demo", "--debug", "--quick")])
def test_debug_anywhere_shows_the_traceback(arguments, run, monkeypatch):
    fail_with(monkeypatch, DataError("cat.jpg is cut short"))
    status, _, stderr = run(*arguments)
    assert status == 1
    assert "Traceback" in stderr and stderr.endswith("error: cat.jpg is cut short\n")


def test_version_is_the_package_version(run):
    assert run("--version") == (0, f"qformers {qformers.__version__}\n", "")
