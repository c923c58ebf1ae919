"""docs/library.md is run as it stands."""

import asyncio
import os
import re
import sys
from pathlib import Path

from tests.stores import install

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


async def test_the_example_of_the_library_prints_what_the_page_says(database: str, tmp_path: Path) -> None:
    installed = await install(database)
    await installed.stream()
    page = PAGE.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    program = tmp_path / "example.py"
    program.write_text(code)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(program), env={**os.environ, "STORE": installed.service}, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert out.decode() == printed
