"""The repository as a whole: pins, words and flags of the README, blocks that are repeated on purpose."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import setup_env
from setup_env import ensure_environment, installed, read_pins

OURS = {"model", "trainer", "dataset", "scripts", "eval_model", "setup_env"}
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
    return [ROOT / "eval_model.py", *(path for folder in folders for path in (ROOT / folder).glob("*.py"))]


def test_requirements_pin_what_the_project_imports_and_nothing_else():
    assert set(read_pins(ROOT / "requirements.txt")) == imported_packages(project_files())


def test_test_requirements_hold_what_only_the_tests_import():
    pins = read_pins(ROOT / "requirements-test.txt")
    tools = {"ruff", "pytest-timeout"}  # used as commands and plug-ins, never imported
    assert imported_packages((ROOT / "tests").glob("*.py")) <= set(pins)
    assert set(pins) - set(read_pins(ROOT / "requirements.txt")) - tools == {"pytest", "hypothesis"}


def test_pins_follow_the_python_version(tmp_path):
    (tmp_path / "base.txt").write_text("a==1\n")
    other = sys.version_info[1] + 1
    text = f'-r base.txt\n# note\nb==2; python_version < "3.{other}"\nb==3; python_version >= "3.{other}"\n'
    (tmp_path / "more.txt").write_text(text)
    assert read_pins(tmp_path / "more.txt") == {"a": "1", "b": "2"}


def test_environment_is_reused_when_the_pins_are_installed():
    assert installed({}) and not installed({"no-such-package-here": "1"})
    if installed(read_pins(ROOT / "requirements.txt")):
        assert ensure_environment("requirements.txt") == Path(sys.executable)


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
            sources.append((ROOT / "trainer" / "trainer_utils.py").read_text(encoding="utf-8"))
        for flag in re.findall(r"\s--(no-)?([a-z_]+)", line[line.index(".py") :]):
            assert any(f"--{flag[1]}" in source for source in sources), f"{line}: no such flag --{flag[1]}"


def test_both_readmes_show_the_same_commands_and_figures():
    english, chinese = (p.read_text(encoding="utf-8") for p in READMES)
    blocks = [re.findall(r"```(?:bash|text)?\n(.*?)```", t, flags=re.S) for t in (english, chinese)]
    strip = [[re.sub(r"\s+#.*", "", block) for block in found] for found in blocks]
    assert strip[0] == strip[1]
    prose = [re.sub(r"```.*?```", "", text, flags=re.S) for text in (english, chinese)]
    numbers = [sorted(re.findall(r"(?<![\w.])\d[\d,.]*\d\b", text)) for text in prose]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("script", ["trainer/train_pretrain.py", "trainer/train_full_sft.py", "scripts/bench_train.py"])
def test_help_works_from_another_folder(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "--" in done.stdout, done.stderr


def test_no_flag_is_dead():
    """Every flag that a trainer defines is read somewhere: as args.flag, or by its quoted name."""
    flags, read = set(), set()
    for path in (ROOT / "trainer").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                (flags if node.value.startswith("--") else read).add(node.value.removeprefix("--"))
    flags = {flag for flag in flags if re.fullmatch("[a-z_]+", flag)}
    assert len(flags) > 25 and {"batch_size", "resume", "seed"} <= flags
    assert not flags - read - {"no-"}, f"defined and never read: {flags - read}"


def test_the_scripts_run_on_the_oldest_python_as_syntax():
    for path in project_files():
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
