"""The page of the documentation runs as it is written."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "torch.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "[18, 19, 20]" in said and "shape=(64, 8)" in said
