"""lm-evaluation-harness, with the demo model's exam as tasks; the server tokenizes."""

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lessons import MODEL
from lm_eval.tasks import TaskManager

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def evaluated(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": MODEL,
                "base_url": f"{server_url}/v1/completions",
                "num_concurrent": 4,
                "max_length": 1024,
            },
            tasks=["demo_sums_choice", "demo_sums_generate"],
            task_manager=TaskManager(include_path=str(ROOT / "demo" / "lm_eval"), include_defaults=False),
            bootstrap_iters=0,
        )
    return found


def test_multiple_choice_finds_the_results(evaluated: dict[str, Any]) -> None:
    assert evaluated["results"]["demo_sums_choice"]["acc,none"] > 0.9


def test_generated_answers_have_the_results(evaluated: dict[str, Any]) -> None:
    assert evaluated["results"]["demo_sums_generate"]["exact_match,final_number"] > 0.9


def test_scores_are_those_of_every_question(evaluated: dict[str, Any]) -> None:
    samples = evaluated["samples"]["demo_sums_choice"]
    assert len(samples) == 100
    for sample in samples:
        scores = [float(response[0][0]) for response in sample["resps"]]
        assert len(scores) == 4
        assert all(score < 0 for score in scores)
