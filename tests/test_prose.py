"""The script that counts sentences counts what a person reads, and nothing else."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/prose.py"

PAGE = """# A heading is not text. Nor is this.

One two three. Four `five six seven` [eight nine](https://example.org/page.html) ten: Eleven
twelve thirteen.

    indented code. Is not text.

```
fenced code. Is not text.

Nor is this.
```

| a table | is not text. Nor is this |
| --- | --- |

![an image](plot.png)

- **Memory.** A list item without a full stop
- The second of 2.5 items, e.g. this one; it goes
  on.
"""


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prose", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sentences_are_those_of_paragraphs_and_list_items(prose: ModuleType) -> None:
    assert prose.sentences(PAGE) == [
        "One two three.",
        "Four Code eight nine ten:",
        "Eleven twelve thirteen.",
        "A list item without a full stop",
        "The second of 2.5 items, e.g. this one; it goes on.",
    ]


def test_a_count_has_words_and_long_sentences(prose: ModuleType) -> None:
    counted = prose.count(["word " * 30, "word " * 31, "three words - here"])
    assert counted == prose.Count(sentences=3, words=64, long=1)
    assert not counted.passes


def test_a_page_over_the_bars_is_named_with_its_longest_sentence(
    prose: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = tmp_path / "short.md", tmp_path / "long.md"
    short.write_text("One short sentence. Another short one.\n", encoding="utf-8")
    long.write_text("One " + "more " * 40 + "word.\n", encoding="utf-8")
    assert prose.main([str(short)]) == 0
    capsys.readouterr()
    assert prose.main([str(short), str(long)]) == 1
    printed = capsys.readouterr().out
    assert f"{long}: expected a mean of at most 16 words" in printed
    assert "42: One more" in printed
    assert f"{short}: expected" not in printed
