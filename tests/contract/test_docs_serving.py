"""docs/serving.md does what it says: its curl lines and its Python are run, its codes are all there are."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from qformers.serving.config import ServeConfig
from qformers.serving.errors import CODES

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
SHELL = [block for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) if "curl" in block]
LINES = [*SHELL[0].splitlines(), *SHELL[1:]]


@pytest.fixture
def pictures(toy_models, tmp_path, monkeypatch):
    """A folder with the pictures that the document talks of."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("cat", "dog")):
        Path(f"{name}.png").write_bytes(toy_models.content(number))


@pytest.mark.parametrize("line", LINES)
def test_curl_lines_run(line, service, pictures):
    line = line.replace("captioner_t5", "stage2").replace("curl ", "curl --noproxy '*' --fail-with-body ")
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        env={"URL": service.url, "PATH": "/usr/bin:/bin"},
        capture_output=True,
    )
    assert done.returncode == 0 and done.stdout, done.stdout + done.stderr
    if "/metrics" not in line and "chat" not in line:
        assert "error" not in json.loads(done.stdout)
    if "chat" in line:
        assert done.stdout.endswith(b"data: [DONE]\n\n")


def test_every_address_is_among_the_lines():
    addresses = {address for line in LINES for address in re.findall(r"\$URL(/\S+)", line)}
    table = {address for row in re.findall(r"^\| `(?:POST|GET) .*", TEXT, re.MULTILINE)
             for address in re.findall(r"/[a-z0-9/]+", row.split("|")[1])}  # fmt: skip
    assert table - {"/healthz"} == addresses


def test_its_python_runs(service, pictures):
    block = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    exec(block[1].replace("http://127.0.0.1:8000", service.url), {})


def test_its_limits_and_codes_are_the_codes():
    for option in re.findall(r"`--(\w+)`", TEXT):
        assert option in {*ServeConfig.__dataclass_fields__, "model", "index"}, option
    named = set(re.findall(r"`(\w+)`", TEXT[TEXT.index("## Errors") :]))
    assert {code for codes in CODES.values() for code in codes} <= named
