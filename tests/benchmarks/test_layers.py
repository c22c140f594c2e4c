import sys

import pytest

from benchmarks import layers


@pytest.mark.slow
@pytest.mark.parametrize("model", layers.SHAPES)
def test_layers_prints_a_row_per_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    monkeypatch.setattr(layers, "INPUTS", ((1, 1), (2, 3)))
    monkeypatch.setattr(sys, "argv", ["layers", "--models", model, "--pairs", "2", "--num_hidden_layers", "1"])
    layers.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {model}")]
    assert [row.split("|")[2].strip() for row in rows] == ["1 x 1", "2 x 3"]
