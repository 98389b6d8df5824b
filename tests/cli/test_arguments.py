"""Commands, flags and the way wrong ones are refused; nothing here may need torch."""

from __future__ import annotations

import argparse

import pytest

from distckpt.cli import WIDTH
from distckpt.cli.main import Usage, main, parse, parser
from distckpt.errors import BadUsage

from .process import distckpt, python


def surface() -> dict[str, list[str]]:
    """Every command with its flags, and the top level as ""."""
    found: dict[str, list[str]] = {}

    def visit(name: str, of: argparse.ArgumentParser) -> None:
        found[name] = []
        for action in of._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, inner in action.choices.items():
                    visit(word, inner)
            else:
                found[name] += action.option_strings or [action.dest.upper()]

    visit("", parser())
    return found


def test_commands_and_flags_are_what_they_were() -> None:
    assert surface() == {
        "": ["-h", "--help", "--version"],
        "doctor": ["-h", "--help", "--json", "--device", "--no-self-test", "--import", "--timeout"],
        "run": ["-h", "--help", "--json", "--quiet", "-m", "SCRIPT"],
    }


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["run", "--help"], ["--version"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from distckpt.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'distckpt_backends', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_wrong_arguments_import_no_torch_and_are_the_line_of_the_coded_error() -> None:
    code = (
        "import sys; from distckpt.cli.main import main\n"
        "assert main([]) == 2 and main(['doctor', '--jsn']) == 2\n"
        "assert not {'torch', 'distckpt_backends'} & set(sys.modules)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    usage = Usage("this", "that")
    assert usage.line() == BadUsage(usage.what, fix=usage.fix).line()


def test_torchs_words_about_numpy_are_not_what_a_command_prints() -> None:
    done = python(
        *("-W", "default", "-c"),
        "import sys; sys.modules['numpy'] = None\n"
        "from distckpt.cli.main import main; main(['doctor', '--no-self-test'])",
    )
    assert done.stdout.startswith("distckpt ")
    assert "NumPy" not in done.stderr


def test_a_name_of_the_library_is_there_when_it_is_asked_for() -> None:
    code = (
        "import sys, distckpt as dc\n"
        "assert 'torch' not in sys.modules and dc.__version__\n"
        "assert callable(dc.checkpoint) and 'torch' in sys.modules\n"
        "assert 'checkpoint' in vars(dc) and 'apply' in dir(dc) and not hasattr(dc, 'nothing')\n"
        "from distckpt import *\n"
        "assert apply is dc.apply\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_at_once_where_torch_is() -> None:
    done = python("-c", "import torch, distckpt as dc; assert 'checkpoint' in vars(dc)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("columns", ["88", "300"])
def test_help_is_never_wider_than_88_columns(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for command in ([], ["doctor"], ["run"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--help"])
        assert end.value.code == 0
    assert WIDTH == 88
    assert max(map(len, capsys.readouterr().out.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command given: distckpt doctor, or distckpt run SCRIPT; see distckpt --help"),
        (["doktor"], "invalid choice: 'doktor'"),
        (["doctor", "--jsn"], "unrecognized arguments: --jsn: see distckpt --help"),
        (["doctor", "--js"], "unrecognized arguments: --js"),
        (["doctor", "--timeout", "soon"], "argument --timeout: invalid float value: 'soon'"),
        (["doctor", "--timeout", "0"], "--timeout is 0: give seconds above 0"),
        (["run"], "run has nothing to run: distckpt run SCRIPT ARGS"),
        (["run", "-m"], "argument -m: expected one argument: see distckpt run --help"),
        (["run", "--loud", "train.py"], "unrecognized arguments: --loud"),
        (["run", "--json", "no/where/x.json", __file__], "there is no folder no/where: make it"),
    ],
)
def test_wrong_arguments_are_one_line_with_the_fix_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("distckpt: [DC701] ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "module", "script", "rest"),
    [
        (["train.py", "--json", "x", "-m", "y"], None, "train.py", ["--json", "x", "-m", "y"]),
        (["--json", "r.json", "--quiet", "train.py", "--quiet"], None, "train.py", ["--quiet"]),
        (["--json=r.json", "train.py", "run"], None, "train.py", ["run"]),
        (["-m", "pkg.train", "--help"], "pkg.train", None, ["--help"]),
        (["-mpkg.train", "a"], "pkg.train", None, ["a"]),
        (["--quiet", "-m", "pkg", "-m"], "pkg", None, ["-m"]),
        (["--", "train.py", "--"], None, "train.py", ["--"]),
    ],
)
def test_all_after_the_script_is_its_own(
    arguments: list[str], module: str | None, script: str | None, rest: list[str]
) -> None:
    options = parse(["run", *arguments])
    assert (options.module, options.script, options.rest) == (module, script, rest)


def test_usage_is_an_exception_before_it_is_a_line() -> None:
    with pytest.raises(Usage, match="nothing to run"):
        parse(["run"])


def test_the_module_is_the_command() -> None:
    done = distckpt("--version")
    assert (done.returncode, done.stdout) == (0, "distckpt 0.1.0\n")
