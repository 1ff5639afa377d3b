"""What the pages of docs/ print runs as it is printed: the Python of a page is one program."""

import os
import re
import subprocess
import sys

import pytest
from places import ROOT
from test_readme import COMMENT, blocks, lacking

import quant

PAGES = sorted(path for path in (ROOT / "docs").glob("*.md"))


def found_in(page):
    return blocks(page.read_text(encoding="utf-8"), dict.fromkeys(lacking()))


def program(found):
    return "\n".join(code for language, code, reason in found if language == "python" and reason is None)


WITH_PYTHON = [page for page in PAGES if program(found_in(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_its_language_or_why_it_is_not_run(page):
    found = found_in(page)
    assert {language for language, _, _ in found} <= {"python", "sh", "c", "ini", "text"}
    # commands are tried on the machines they are for; a block of them in a page says so
    assert all(reason for language, _, reason in found if language == "sh")
    comments = COMMENT.findall(page.read_text(encoding="utf-8"))
    assert len(comments) == sum(reason is not None for _, _, reason in found)


def test_most_pages_for_users_have_something_to_run():
    assert {"quickstart", "int8", "parity", "streaming", "heads", "encoders"} <= {page.stem for page in WITH_PYTHON}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_a_page_runs_as_printed(page, tmp_path):
    for name in ("examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run([sys.executable, "-W", "error", "-c", program(found_in(page))], cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_is_in_the_site_and_the_workbench_in_its_reference():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f": {page.name}\n" not in site] == []
    reference = (ROOT / "docs/api/quant.md").read_text(encoding="utf-8")
    assert [name for name in quant.__all__ if f".{name}\n" not in reference] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_tables_have_names_links_do_not_name_files_and_prose_is_no_code(page):
    text = page.read_text(encoding="utf-8")
    heads = re.findall(r"^(\|.*\|)\n\|[-:| ]+\|$", text, re.M)
    assert [head for head in heads if not re.search(r"\w", head)] == []
    assert re.findall(r"\[[^\]]*\.md\]\([^)]*\)", text) == []
    # text that is indented behind a table is shown as a block of code
    assert re.findall(r"^\|.*\|\n\n {4}\S.*", text, re.M) == []
