"""Who may be let in: settings that would open the service to others are refused before it starts."""

from __future__ import annotations

import pytest

from qformers.cli import main
from qformers.errors import ConfigError
from qformers.serving.config import ServeConfig


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_another_host_needs_a_token(host):
    with pytest.raises(ConfigError, match="token"):
        ServeConfig(host=host)
    assert not ServeConfig(host=host, token="long enough").is_local


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LocalHost"])
def test_this_machine_needs_none(host):
    assert ServeConfig(host=host).is_local


@pytest.mark.parametrize("token", ["short", "with\nline break", "gehört uns allen"])
def test_a_token_that_cannot_be_sent_or_is_guessed_is_refused(token):
    with pytest.raises(ConfigError, match="token"):
        ServeConfig(token=token)


@pytest.mark.parametrize("setting", [{"port": -1}, {"max_batch": 0}, {"time_limit_seconds": 0}, {"max_body_bytes": -5}])
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ServeConfig(**setting)


def test_the_command_refuses_in_one_line(capsys, monkeypatch):
    monkeypatch.delenv("QFORMERS_TOKEN", raising=False)
    assert main(["serve", "--model", "nowhere", "--host", "0.0.0.0"]) == 1
    error = capsys.readouterr().err
    assert "QFORMERS_TOKEN" in error and error.count("\n") == 1
