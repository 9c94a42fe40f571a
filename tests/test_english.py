"""A word count of the project's English: words that a translation uses and engineers of the field do not."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = re.compile(r"\b(beside|behind|lies?|stands?|told|alone)\b", re.IGNORECASE)
FILES = ("*.py", "*.md", "*.h", "*.cpp", "*.cu")
# per 10,000 lines; comparable projects have 1 to 4
LIMIT = 15


def test_few_words_of_a_translation():
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to list the project's files")
    names = subprocess.run(["git", "ls-files", "-z", *FILES], cwd=ROOT, capture_output=True, text=True, check=True)
    lines, found = 0, []
    for name in filter(None, names.stdout.split("\0")):
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            lines += 1
            found += [f"{name}:{number}: {word}" for word in WORDS.findall(line)]
    assert lines > 10_000
    rate = len(found) * 10_000 / lines
    assert rate <= LIMIT, f"{rate:.0f} words per 10,000 lines, {LIMIT} are allowed:\n" + "\n".join(found)
