"""The repository as a whole: pins, words and flags of the README, blocks that are repeated on purpose."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import setup_env
from setup_env import ensure_environment, installed, read_pins, run_step

OURS = {"model", "trainer", "dataset", "scripts", "tests", "eval_model", "setup_env"}
OPTIONAL = {"deepspeed", "llama_cpp"}  # imported where they are used, with one clear line when missing
COMES_WITH = {"starlette": "fastapi", "h11": "uvicorn", "pandas": "streamlit"}  # of our own pins
COMES_WITH |= {"httpx2": "openai", "markdown_it": "rich"}
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]


def imported_packages(paths) -> set[str]:
    """Top-level names of all third-party imports in these files, nested imports included."""
    names, paths = set(), list(paths)
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    local = {path.stem for path in paths}
    return names - set(sys.stdlib_module_names) - OURS - local


def project_files() -> list[Path]:
    folders = ("model", "trainer", "dataset", "scripts")
    return [ROOT / "eval_model.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


def test_requirements_pin_what_the_project_imports_and_nothing_else():
    pins = set(read_pins(ROOT / "requirements.txt"))
    assert set(COMES_WITH.values()) <= pins
    assert pins == imported_packages(project_files()) - OPTIONAL - set(COMES_WITH)


def test_test_requirements_hold_what_only_the_tests_import():
    pins = read_pins(ROOT / "requirements-test.txt")
    # used as commands and plug-ins or through another package, never imported
    tools = {"ruff", "pytest-timeout", "pytest-xdist", "tensorboard", "accelerate", "deepspeed"}
    assert imported_packages((ROOT / "tests").glob("*.py")) - set(COMES_WITH) - OPTIONAL <= set(pins)
    only_here = {"pytest", "hypothesis", "peft", "trl", "lm_eval"}
    assert set(pins) - set(read_pins(ROOT / "requirements.txt")) - tools == only_here


def test_pins_follow_the_python_version_and_the_system(tmp_path):
    (tmp_path / "base.txt").write_text("a==1\n")
    other = sys.version_info[1] + 1
    text = f'-r base.txt\n# note\nb==2; python_version < "3.{other}"\nb==3; python_version >= "3.{other}"\n'
    text += f'c==4; sys_platform == "{sys.platform}"\nd==5; sys_platform == "plan9"\n'
    (tmp_path / "more.txt").write_text(text)
    assert read_pins(tmp_path / "more.txt") == {"a": "1", "b": "2", "c": "4"}


def test_environment_is_reused_when_the_pins_are_installed():
    assert installed({}) and not installed({"no-such-package-here": "1"})


def test_this_interpreter_is_used_when_it_has_everything(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    (tmp_path / "needs.txt").write_text(f"pytest=={pytest.__version__}\n")
    assert ensure_environment("needs.txt") == Path(sys.executable)


def test_a_half_made_environment_is_made_again(monkeypatch, tmp_path):
    """An interrupted start left a Python without pip."""
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    (tmp_path / "needs.txt").write_text("torch==0\n")
    made, python = [], tmp_path / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python.parent.mkdir(parents=True)
    python.touch()

    def run(command, **options):
        if "--version" in command:
            return subprocess.CompletedProcess(command, 1)
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(setup_env.subprocess, "run", run)
    monkeypatch.setattr(setup_env.venv, "create", lambda folder, **options: made.append(options))
    with pytest.raises(SystemExit, match="setting up .* failed"):
        ensure_environment("needs.txt")
    assert made == [{"with_pip": True, "clear": True}]


def test_a_step_passes_its_status_on():
    run_step(sys.executable, "-c", "raise SystemExit(0)")
    with pytest.raises(SystemExit) as stop:
        run_step(sys.executable, "-c", "raise SystemExit(7)")
    assert stop.value.code == 7


def test_a_step_reads_what_is_typed(capfd):
    run_step(sys.executable, "-c", "print(input() + '|' + input())", typed="你好\nworld\n")
    assert "你好|world" in capfd.readouterr().out
    run_step(sys.executable, "-c", "pass", typed="x" * 10**6)  # nobody reads it


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent to a process group")
def test_ctrl_c_waits_for_the_step_to_save(tmp_path):
    saves = (
        "import signal, sys, time, pathlib; signal.signal(signal.SIGINT, lambda *a: (time.sleep(1), "
        f"pathlib.Path({str(tmp_path / 'saved')!r}).touch(), sys.exit(130))); print('up', flush=True); time.sleep(30)"
    )
    outer = "import sys; sys.path.insert(0, 'scripts'); import setup_env; "
    outer += f"setup_env.run_step(sys.executable, '-c', {saves!r})"
    process = subprocess.Popen([sys.executable, "-c", outer], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline().strip() == b"up"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130 and (tmp_path / "saved").exists()
    process.stdout.close()


def test_a_python_without_venv_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    (tmp_path / "needs.txt").write_text("no-such-package-here==1\n")
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="error: .*apt install python3-venv"):
        ensure_environment("needs.txt")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_readme_names_only_what_exists(readme):
    """Every script in a command, every flag beside it and every linked file is there."""
    text = readme.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)|src=\"([^\"]+)\"", text):
        target = next(part for part in link if part)
        if "://" not in target:
            assert (ROOT / target).exists(), f"{readme.name} links to {target}"
    for line in re.findall(r"^.*?((?:python|torchrun)[^\n`#]*\.py[^\n`#]*)", text, flags=re.M):
        script = ROOT / re.search(r"\S+\.py", line)[0]
        assert script.is_file(), f"{readme.name} runs {script}"
        sources = [script.read_text(encoding="utf-8")]
        if script.parent.name == "trainer":
            shared = (ROOT / "trainer" / "trainer_utils.py", ROOT / "trainer" / "zero.py")
            sources += [path.read_text(encoding="utf-8") for path in shared]
        line = line.partition(" -- ")[2] or line  # streamlit passes on what stands behind it
        for flag in re.findall(r"\s--(no-)?([a-z_]+)", " " + line.rpartition(".py")[2]):
            assert any(f'"--{flag[1]}"' in source for source in sources), f"{line}: no such flag --{flag[1]}"


def test_both_readmes_show_the_same_commands_and_figures():
    english, chinese = (p.read_text(encoding="utf-8") for p in READMES)
    blocks = [re.findall(r"```(?:bash|text)?\n(.*?)```", t, flags=re.S) for t in (english, chinese)]
    strip = [[re.sub(r"\s+#.*", "", block) for block in found] for found in blocks]
    assert strip[0] == strip[1]
    prose = [re.sub(r"```.*?```", "", text, flags=re.S) for text in (english, chinese)]
    numbers = [sorted(re.findall(r"(?<![\w.])\d[\d,.]*\d\b", text)) for text in prose]
    assert numbers[0] == numbers[1]


HELP = """
import contextlib, io, json, pathlib, runpy, sys
root, path = sys.argv[1], list(sys.path)
said = {}
for script in sys.argv[2:]:
    sys.path[:] = [str(pathlib.Path(root, script).parent), *path[1:]]  # as for a process of its own
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name != "__main__" and file.startswith(root) and ".venv" not in file:
            del sys.modules[name]
    out, status = io.StringIO(), None
    with contextlib.redirect_stdout(out):
        sys.argv = [script, "--help"]
        try:
            runpy.run_path(str(pathlib.Path(root, script)), run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code
        except Exception as error:
            status = repr(error)
    said[script] = [status, out.getvalue()]
print(json.dumps(said))
"""


def test_help_works_from_another_folder(tmp_path):
    """All in one process, which imports torch once; the project's own modules are imported anew for each script."""
    scripts = sorted(
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "trainer").glob("train_*.py")]
        + [ROOT / "dataset" / "check_data.py", ROOT / "dataset" / "make_demo_data.py"]
        if "argparse.ArgumentParser(" in path.read_text(encoding="utf-8")
    )
    assert len(scripts) > 28
    done = subprocess.run(
        [sys.executable, "-c", HELP, str(ROOT), *scripts], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    for script, (status, said) in json.loads(done.stdout.splitlines()[-1]).items():
        assert status in (0, None) and "--" in said, (script, status)


def test_no_flag_is_dead():
    """Every flag that a trainer defines is read somewhere: as args.flag, or by its quoted name."""
    flags, read = set(), set()
    for path in (ROOT / "trainer").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read |= {node.attr} if ast.unparse(node.value) in ("args", "self.args") else set()
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                (flags if node.value.startswith("--") else read).add(node.value.removeprefix("--"))
    flags = {flag for flag in flags if re.fullmatch("[a-z_]+", flag)}
    assert len(flags) > 25 and {"batch_size", "resume", "seed"} <= flags
    assert not flags - read - {"no-"}, f"defined and never read: {flags - read}"


def test_the_scripts_run_on_the_oldest_python_as_syntax():
    for path in project_files():
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
