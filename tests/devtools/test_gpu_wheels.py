import pytest

from devtools import gpu_wheels


def test_gpu_wheels_are_the_lock_without_torch_and_with_pytest() -> None:
    pinned = gpu_wheels.requirements("3.12", skipped=["Pandas"])
    names = {requirement.partition("==")[0] for requirement in pinned}
    assert {"kserve", "transformers", "bitsandbytes", "llguidance", "httpx", "pytest", "hypothesis"} <= names
    assert not names & {"torch", "triton", "sympy", "pandas"}
    assert "colorama" not in names, "for Windows only"
    assert not [name for name in names if name.startswith("nvidia")]
    assert all(requirement.count("==") == 1 for requirement in pinned)


def test_gpu_wheels_are_split_into_parts_with_bitsandbytes_last() -> None:
    sizes = {"a-1-py3-none-any.whl": 3, "b-1-py3-none-any.whl": 6, "c-1-py3-none-any.whl": 4}
    sizes["bitsandbytes-1-py3-none-any.whl"] = 8
    parts = gpu_wheels.split(sizes, 10)
    assert [[name[0] for name in part] for part in parts] == [["b", "c"], ["a"], ["b"]]
    assert parts[-1] == ["bitsandbytes-1-py3-none-any.whl"]
    with pytest.raises(SystemExit, match=r"bitsandbytes-1-py3-none-any\.whl .* Raise --part_mib"):
        gpu_wheels.split(sizes, 7)
