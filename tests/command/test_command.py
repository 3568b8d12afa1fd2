"""The command as a process, and `moeca env`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moeca_compile
from moeca_compile.command import env
from moeca_compile.command.main import main


def test_the_environment_says_what_a_bug_report_needs(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    known = {name: value.strip() for name, value in lines.items()}
    assert known["moeca_compile"] == moeca_compile.__version__
    assert known["torch"].startswith(torch.__version__)
    assert "threads" in known["cpu"] and "free" in known["cpu"]
    assert known["CPU kernels"].startswith("grouped_linear ")
    assert known["missing in torch"] == "nothing"


def test_what_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(env, "_PACKAGES", ("no-such-package",))
    monkeypatch.setattr(env, "library", lambda source: None)
    monkeypatch.setattr(env, "which", lambda name: None)
    monkeypatch.setattr(env, "missing", lambda: ("torch._gone",))
    monkeypatch.delenv("CXX", raising=False)
    known = env.environment()
    assert known["no-such-package"] == "not installed"
    assert known["C++ compiler"] == "none: install g++"
    assert (
        known["CPU kernels"]
        == "grouped_linear not compiled, PyTorch's ops run, combine not compiled, PyTorch's ops run"
    )
    assert known["missing in torch"] == "torch._gone"


def test_the_module_is_the_command_and_the_folder_it_runs_in_is_searched(tmp_path):
    (tmp_path / "mine.py").write_text("def make(): return 1\n")
    root = str(Path(moeca_compile.__file__).parents[1])
    command = [sys.executable, "-P", "-m", "moeca_compile", "explain", "mine:make"]
    if sys.version_info < (3, 11):
        command.remove("-P")
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "mine:make returned a int" in done.stderr, done.stderr


def test_without_a_command_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2 and "explain" in capsys.readouterr().err


def test_the_script_is_declared():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.scripts]\nmoeca = "moeca_compile.command.main:main"' in project
