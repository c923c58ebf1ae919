"""The example of code in place of a definition passes its own test, as somebody runs it who has only the folder."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "handler"


def test_the_examples_own_test_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(tmp_path / "none.ini"), "--rootdir", str(FOLDER)]
    (tmp_path / "none.ini").write_text("[pytest]\n")
    ran = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(FOLDER)], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 passed" in ran.stdout
