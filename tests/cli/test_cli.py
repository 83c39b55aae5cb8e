import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from ping_llm import __version__
from ping_llm.cli import COMMANDS, cli
from ping_llm.errors import ConfigError


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_table_of_commands_repeats_each_commands_own_summary(name):
    command = cli.get_command(click.Context(cli), name)
    assert command.name == name
    assert command.help.splitlines()[0] == COMMANDS[name]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_has_a_help_text(name):
    command = cli.get_command(click.Context(cli), name)
    leaves = command.commands.values() if isinstance(command, click.Group) else [command]
    for leaf in leaves:
        for param in leaf.params:
            if isinstance(param, click.Option):
                assert param.help, f"{name} {param.opts[-1]}"


def failing(exception):
    @click.command()
    def command():
        raise exception

    return command


def run_failing(monkeypatch, exception, *flags):
    monkeypatch.setattr(cli, "get_command", lambda ctx, name: failing(exception))
    return CliRunner().invoke(cli, [*flags, "train"])


def test_an_error_of_the_user_is_one_line_and_exit_code_1(monkeypatch):
    result = run_failing(monkeypatch, ConfigError("mesh data=3 needs 3 devices; JAX sees 1"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: mesh data=3 needs 3 devices; JAX sees 1\n"


def test_debug_shows_the_traceback(monkeypatch):
    result = run_failing(monkeypatch, ConfigError("no"), "--debug")
    assert isinstance(result.exception, ConfigError)


def test_ctrl_c_exits_with_130(monkeypatch):
    assert run_failing(monkeypatch, KeyboardInterrupt()).exit_code == 130


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    result = run_failing(monkeypatch, ZeroDivisionError())
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize("args", [["no-such-command"], ["train", "--no-such-flag"], ["train"]])
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(args):
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 2
    assert "Error:" in result.stderr


def test_version():
    assert CliRunner().invoke(cli, ["--version"]).output == f"ping-llm, version {__version__}\n"


def test_the_package_runs_as_a_module():
    words = [sys.executable, "-m", "ping_llm", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"ping-llm, version {__version__}\n"


def test_sigterm_exits_with_143():
    code = (
        "import time, click, ping_llm.cli as c\n"
        "command = click.Command('x', callback=lambda: (print('up', flush=True), time.sleep(60)))\n"
        "c.cli.get_command = lambda ctx, name: command\n"
        "c.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "x"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    process.stdout.close()
