"""Every code block of the README and of docs/ is run at toy size, or says what it needs that a test has not.

Right before a block a comment may say `needs: gpu`, `hub` or `minutes` (its qformers commands are then only parsed),
`file: NAME` (it is written there), `like: NAME` (a file there begins alike) or `recipe: part` (settings of a recipe).
What a page's commands find around them is made by toy_docs.py; pages are worked through from top to bottom, each in a
folder of its own.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_docs import PICTURES, write_checkpoints

import qformers
from qformers import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[a-z]+: .*?) -->\n)?^```(?P<language>\w*)\n(?P<content>.*?)^```", re.M | re.S)
NEEDS = ("gpu", "hub", "minutes")
EXTRAS = metadata("qformers").get_all("Provides-Extra") or []

# The runs that a page's commands start from.
GIVEN = {
    "README.md": {"runs/demo/run": "stage1", "runs/demo/captioner_t5": "stage2"},
    "docs/capfilt.md": {"runs/stage1": "stage1", "runs/stage2": "stage2"},
    "docs/captioning.md": {"runs/captioner": "stage2"},
    "docs/matching.md": {"runs/mine": "stage1"},
    "docs/own_models.md": {"runs/mine": "stage1"},
    "docs/retrieval.md": {"runs/stage1": "stage1"},
}
BY_ANOTHER_TEST = {"docs/serving.md"}  # its curl lines and its Python: contract/test_docs_serving.py


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, and the comment before it as (kind, value)."""

    place: str
    language: str
    content: str
    mark: tuple[str, str] | None


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    blocks = []
    for found in BLOCK.finditer(text):
        kind, _, value = (found["mark"] or "").partition(": ")
        line = text.count("\n", 0, found.start("language")) + 1
        place = f"{document.relative_to(ROOT)}:{line}"
        blocks.append(Block(place, found["language"], found["content"], (kind, value) if kind else None))
    return blocks


def commands_of(content: str) -> list[str]:
    """A block's lines, joined where they go on, without empty ones and comments."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"\|\n\s*", "| ", content)).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_code_blocks_run(document, here, request, capfd):
    name = str(document.relative_to(ROOT))
    blocks = blocks_of(document)
    for path, run in GIVEN.get(name, {}).items():
        shutil.copytree(here / "given" / run, here / path)
    if "Salesforce/blip2" in document.read_text() or "Salesforce/instructblip" in document.read_text():
        write_checkpoints(here)
    spoken_to = any("http://127.0.0.1:8000" in block.content for block in blocks) and name not in BY_ANOTHER_TEST
    url = request.getfixturevalue("service").url if spoken_to else ""
    session: dict[str, Any] = {"qformers": qformers, "torch": torch}
    for block in blocks:
        if name in BY_ANOTHER_TEST and ("curl" in block.content or block.language == "python"):
            continue
        try:
            run_block(block, url, session)
        except Exception as error:
            pytest.fail(f"{block.place}: {error}\n{block.content}\n{capfd.readouterr().err}")


def run_block(block: Block, url: str, session: dict[str, Any]) -> None:
    kind, value = block.mark or ("", "")
    if kind == "needs":
        assert value in NEEDS, f"needs {value}: known are {NEEDS}"
        for command in commands_of(block.content):
            if command.startswith("qformers ") or " qformers " in command:
                parse(shlex.split(command[command.index("qformers ") :], comments=True)[1:])
    elif kind == "file":
        Path(value).parent.mkdir(exist_ok=True)
        Path(value).write_text(block.content, encoding="utf-8")
    elif kind == "like":
        assert Path(value).read_text().splitlines()[0] == block.content.splitlines()[0], f"{value} begins otherwise"
    elif kind == "recipe":
        Path("part.yaml").write_text(block.content, encoding="utf-8")
        parse(["train", "part.yaml", "--output", "runs/part"])
    elif block.language == "python":
        exec(compile(block.content.replace("http://127.0.0.1:8000", url), block.place, "exec"), session)
    else:
        assert block.language == "bash", f"a block of {block.language or 'no language'} needs a mark"
        for command in commands_of(block.content):
            run_command(command, url)


def run_command(command: str, url: str) -> None:
    words = shlex.split(command, comments=True)
    if words[:2] == ["qformers", "serve"]:
        parse(words[1:])
    elif words[0] == "qformers":
        if words[1] == "plan":  # counts and builds nothing: the recipe itself
            words = [word.replace("recipes/", f"{ROOT}/recipes/") for word in words]
        assert status_of(words[1:]) == 0, command
    elif words[0] in ("pip", "python3"):  # run by test_a_newcomer_s_walk_in_a_new_virtual_environment
        check_installing(words)
    else:
        assert words[0] in ("curl", "mkdir", "cp", "echo", "tar"), f"{command}: not run by any test: mark it"
        line = command.replace("http://127.0.0.1:8000", url).replace("curl ", "curl --noproxy '*' --fail-with-body ")
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def status_of(arguments: list[str]) -> Any:
    try:
        return cli.main(arguments)
    except SystemExit as stop:  # --print_config
        return stop.code


def parse(arguments: list[str]) -> None:
    """The command line takes it: every option is there, every setting is known."""
    cli._parse(arguments)


def check_installing(words: list[str]) -> None:
    """The files and the extras that a line of pip's names are there."""
    for word in words:
        if word.endswith(".txt"):
            assert (ROOT / word).is_file(), word
        for extra in re.findall(r"\[([a-z]+)\]", word):
            assert extra in EXTRAS, word


def test_a_block_that_nothing_runs_fails(tmp_path, monkeypatch):
    for language, content, mark in (
        ("bash", "wget x\n", None),
        ("yaml", "a: 1\n", None),
        ("bash", "x\n", ("needs", "time")),
        ("bash", "qformers train recipe.yaml --no.such_setting 3\n", ("needs", "gpu")),
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(Exception, match=r"mark it|needs a mark|known are|recipe\.yaml"):
            run_block(Block("here:1", language, content, mark), "", {})


# The newcomer's walk: the first block of the README that installs.


def the_walk() -> list[str]:
    [walk] = [block for block in blocks_of(ROOT / "README.md") if "python3 -m venv" in block.content]
    return commands_of(walk.content)


def test_a_newcomer_s_walk_ends_with_a_caption_in_fewer_than_ten_commands(here, capfd):
    commands = the_walk()
    assert sum(len(command.split(" && ")) for command in commands) < 10
    assert len(list(Path("pictures").glob("*.jpg"))) == PICTURES == 50
    for command in commands:
        capfd.readouterr()
        run_command(command, "")
    assert re.search(r"pictures/\d+\.jpg", commands[-1]) and commands[-1].startswith("qformers caption")
    assert capfd.readouterr().out.strip()


@pytest.mark.slow
def test_a_newcomer_s_walk_in_a_new_virtual_environment(here):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in tracked:
        if not file.startswith(("recipes/", "tests/")) and (ROOT / file).is_file():
            (here / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, here / file)
    environment = {"PATH": f"{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin", "HOME": str(Path.home())}
    script = "set -e\n" + "\n".join(the_walk())
    done = subprocess.run(["bash", "-c", script], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (here / ".venv" / "bin" / "qformers").is_file() and done.stdout.splitlines()[-1].strip()
