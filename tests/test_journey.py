"""The pages of docs/journey, their commands as they stand there, one after the other in one folder as a reader's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/journey/[0-9]-*.md"))


def blocks(page, kind="bash"):
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Reads the pages up to the one asked for, each once."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    scripts = folder / ".venv" / "bin"                  # of a .venv that activates the Python of these tests
    scripts.mkdir(parents=True)
    (scripts / "activate").write_text(f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("MOE_CHECK", None)
    unread = iter(PAGES)

    def read(page):
        for each in unread:
            for block in blocks(each):
                done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment,
                                      stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
                assert done.returncode == 0, f"{each.name}:\n{block}\n{done.stdout}\n{done.stderr}"
            if each == page:
                break
        return folder
    return read


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page(reader, page):
    assert blocks(page)
    reader(page)


def test_the_install_is_what_make_did():
    """What pip is given there, the Makefile has given it, or these tests would not run."""
    made = (ROOT / "Makefile").read_text()
    for given in re.findall(r"pip install (.*)", blocks(PAGES[0], "bash install")[0]):
        assert given in made


def test_each_page_leads_to_the_next():
    for page, following in zip(PAGES, [*PAGES[1:], None], strict=True):
        text = page.read_text()
        assert following is None or f"]({following.name})" in text
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), (page.name, link)
