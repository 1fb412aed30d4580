"""The import rules of ARCHITECTURE.md hold, and the contracts that say so bite."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cdc", "shippers", "appliers")


def lint(root: Path) -> tuple[bool, str]:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=root, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


def test_the_import_rules_hold() -> None:
    holds, said = lint(ROOT)
    assert holds, said
    assert ", 0 broken" in said


@pytest.fixture
def copied_tree(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(
    ("module", "imports"),
    [
        ("cdc/errors.py", "cdc.record"),
        ("cdc/wire/new.py", "cdc.stores.embedded"),
        ("cdc/wire/new.py", "sqlite3"),
        ("cdc/brokers/new.py", "cdc.stores.embedded"),
        ("cdc/stores/new.py", "shippers"),
        ("appliers/new.py", "shippers"),
        ("shippers/new.py", "appliers"),
        ("cdc/sql/new.py", "psycopg"),
    ],
)
def test_a_forbidden_import_is_found(copied_tree: Path, module: str, imports: str) -> None:
    path = copied_tree / module
    path.write_text((path.read_text() if path.exists() else "") + f"\nimport {imports}\n")
    holds, said = lint(copied_tree)
    assert not holds, said
    assert Path(module).with_suffix("").as_posix().replace("/", ".") in said
    assert imports in said
