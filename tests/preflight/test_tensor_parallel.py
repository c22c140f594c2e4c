"""Models on several GPUs: ranks, heads, memory of a GPU, and what cannot be split."""

from collections.abc import Callable

import pytest

from preflight import gpus
from preflight.checks import resources
from preflight.deployment import Manifest
from tests.preflight.conftest import OVERLAYS, Draft

Drafts = Callable[[str], Draft]
Mistake = Callable[[Draft], object]

LLAMA = resources.read(OVERLAYS / "prod-multi-gpu/model-config.json")
SIZE = gpus.TENSOR_PARALLEL_SIZE


def request(draft: Draft, count: str, resource: str = gpus.GPU) -> Draft:
    for kind in ("requests", "limits"):
        del draft.model["resources"][kind][gpus.GPU]
        draft.model["resources"][kind][resource] = count
    return draft


def select(draft: Draft, **labels: str) -> Draft:
    """Replace the affinity by a node selector with labels of GPU feature discovery."""
    del draft.predictor["affinity"]["nodeAffinity"]
    draft.predictor["nodeSelector"] |= {f"nvidia.com/gpu.{name}": value for name, value in labels.items()}
    return draft


def on_a_cpu(draft: Draft) -> Draft:
    for kind in ("requests", "limits"):
        del draft.model["resources"][kind][gpus.GPU]
        draft.model["resources"][kind].update(cpu="2", memory="200Gi")
    draft.settings.update({SIZE: "4", "PREDICTOR_DEVICE": "cpu", "PREDICTOR_MAX_NUM_SEQS": "32"})
    return draft


def without_shared_memory(draft: Draft) -> None:
    mounts = draft.container["volumeMounts"]
    draft.container["volumeMounts"] = [mount for mount in mounts if mount["name"] != "shm"]
    draft["ServingRuntime"]["spec"]["volumes"].pop()


MISTAKES: dict[str, tuple[Mistake, str]] = {
    "size_not_set": (
        lambda d: [
            d.settings.update({SIZE: "1"}),
            select(d, product="NVIDIA-B200"),
            d.settings.update(PREDICTOR_MAX_MODEL_LEN="2048"),
        ],
        "warning: InferenceService/llm: 4 GPUs are reserved and PREDICTOR_TENSOR_PARALLEL_SIZE is 1, so 3 of them are "
        "idle; set it to auto, or request fewer GPUs. [kserve-llm]",
    ),
    "fewer_ranks_than_gpus": (
        lambda d: [d.settings.update({SIZE: "2"}), select(d, product="NVIDIA-H200")],
        "4 GPUs are reserved and PREDICTOR_TENSOR_PARALLEL_SIZE is 2, so 2 of them are idle",
    ),
    "more_ranks_than_gpus": (
        lambda d: d.settings.update({SIZE: "8"}),
        "error: InferenceService/llm: PREDICTOR_TENSOR_PARALLEL_SIZE is 8, and the pod has 4 GPUs, so the predictor "
        "does not start; set it to auto, or request nvidia.com/gpu: 8. [kserve-llm]",
    ),
    "flag": (lambda d: d.model.update(args=["--tensor-parallel-size=8"]), "PREDICTOR_TENSOR_PARALLEL_SIZE is 8, and"),
    "size_zero": (
        lambda d: [d.settings.update({SIZE: "0"}), request(d, "1"), select(d, product="NVIDIA-X1")],
        "PREDICTOR_TENSOR_PARALLEL_SIZE is '0', so the predictor does not start",
    ),
    "heads": (
        lambda d: request(d, "3"),
        "the model has 64 attention heads and 8 key-value heads, which 3 ranks cannot share equally, so the predictor "
        "does not start; use 1, 2, 4, 8 ranks. [kserve-llm]",
    ),
    "8bit": (
        lambda d: d.settings.update(PREDICTOR_QUANTIZATION="8bit"),
        "PREDICTOR_QUANTIZATION is 8bit, which on a GPU is not divided among 4 ranks, so the predictor does not start; "
        "set it to fp8 or none. [kserve-llm]",
    ),
    "4bit": (
        lambda d: d.settings.update(PREDICTOR_QUANTIZATION="4bit"),
        "PREDICTOR_QUANTIZATION is 4bit, which on a GPU is not divided among 4 ranks",
    ),
    "4bit_on_a_cpu": (
        lambda d: [on_a_cpu(d), d.settings.update({SIZE: "2", "PREDICTOR_QUANTIZATION": "4bit"})],
        "PREDICTOR_QUANTIZATION is 4bit, which on a CPU is not divided among 2 ranks, so the predictor does not start; "
        "set it to 8bit or none. [kserve-llm]",
    ),
    "embed": (
        lambda d: d.settings.update(PREDICTOR_TASK="embed"),
        "PREDICTOR_TASK is embed, and only models that generate are divided among 4 ranks",
    ),
    "slices": (
        lambda d: request(d, "4", "nvidia.com/mig-7g.80gb"),
        "PREDICTOR_TENSOR_PARALLEL_SIZE is auto, and the pod has slices of GPUs, of which a process can use one",
    ),
    "shared_memory_small": (
        lambda d: d["ServingRuntime"]["spec"]["volumes"][1]["emptyDir"].update(sizeLimit="64Mi"),
        "warning: InferenceService/llm: 4 ranks exchange tensors through /dev/shm, which is 64Mi; mount an emptyDir",
    ),
    "shared_memory_missing": (without_shared_memory, "exchange tensors through /dev/shm, which is 64 MiB"),
    "shared_memory_on_disk": (
        lambda d: d["ServingRuntime"]["spec"]["volumes"][1]["emptyDir"].pop("medium"),
        "exchange tensors through /dev/shm, which is on a disk",
    ),
    "memory_by_product": (
        lambda d: select(d, product="NVIDIA-A100-SXM4-40GB"),
        "each GPU needs 43.9 GiB (weights 32.9 GiB, KV cache of one sequence 10.0 GiB), and has 37.3 GiB; use larger",
    ),
    "memory_by_known_product": (lambda d: select(d, product="NVIDIA-L4"), "and has 22.4 GiB"),
    "memory_by_label": (lambda d: select(d, memory="40536"), "and has 39.6 GiB"),
    "memory_by_affinity": (
        lambda d: gpus.required_node_terms(d.predictor)[0]["matchExpressions"][0].update(values=["30000"]),
        "and has 29.3 GiB",
    ),
    "memory_of_one_of_two_terms": (
        lambda d: gpus.required_node_terms(d.predictor).append(
            {"matchExpressions": [{"key": gpus.PRODUCT, "operator": "In", "values": ["Tesla-T4", "NVIDIA-H200"]}]}
        ),
        "and has 14.9 GiB",
    ),
    "host_memory": (
        lambda d: d.model["resources"]["limits"].update(memory="140Gi"),
        "loading needs 143.4 GiB of host memory (checkpoint 131.4 GiB, processes 4.0 GiB, volumes in memory 8.0 GiB), "
        "and the memory limit is 140.0 GiB",
    ),
    "cpu": (
        on_a_cpu,
        "PREDICTOR_TENSOR_PARALLEL_SIZE is 4 on a CPU, and the limit is 2 CPUs, so the processes wait for each other",
    ),
}


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_tensor_parallel_one_mistake_is_one_finding(draft: Drafts, mistake: Mistake, sentence: str) -> None:
    multi = draft("prod-multi-gpu")
    multi.settings["PREDICTOR_MAX_MODEL_LEN"] = "131072"
    mistake(multi)
    [finding] = multi.check(model=LLAMA)
    assert sentence in str(finding)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        lambda d: d.settings.update({SIZE: "4"}),
        lambda d: d.settings.update(PREDICTOR_QUANTIZATION="fp8"),
        lambda d: d.settings.update(PREDICTOR_QUANTIZATION="8bit", PREDICTOR_QUANTIZATION_FALLBACK="true"),
        lambda d: request(d, "8"),
        lambda d: select(d, product="NVIDIA-H100-80GB-HBM3"),
        # A product without a size in its name, which is not known either, cannot be checked.
        lambda d: select(d, product="NVIDIA-X1"),
        lambda d: [request(d, "1"), select(d, product="NVIDIA-B200")],
        lambda d: d["ServingRuntime"]["spec"]["volumes"][1]["emptyDir"].pop("sizeLimit"),
    ],
)
def test_tensor_parallel_valid_change_is_no_finding(draft: Drafts, change: Mistake) -> None:
    multi = draft("prod-multi-gpu")
    change(multi)
    assert multi.check(model=LLAMA) == []


@pytest.mark.parametrize(
    ("size", "devices", "ranks"),
    [("1", "4", 1), ("auto", "4", 4), ("auto", "1", 1), ("2", "4", 2), ("0", "4", 1), ("many", "4", 1)],
)
def test_ranks_auto_is_the_number_of_gpus(draft: Drafts, size: str, devices: str, ranks: int) -> None:
    multi = draft("prod-multi-gpu")
    request(multi, devices)
    multi.settings[SIZE] = size
    assert gpus.ranks(multi.deployment) == ranks


@pytest.mark.parametrize(
    ("labels", "gigabytes"),
    [
        ({"product": "NVIDIA-A100-SXM4-80GB"}, 80),
        ({"product": "Tesla-V100-SXM2-16GB"}, 16),
        ({"product": "NVIDIA-L40S"}, 48),
        ({"product": "NVIDIA-H100-80GB-HBM3", "memory": "81559"}, 85.52),
        ({"product": "NVIDIA-X1"}, None),
        ({}, None),
    ],
)
def test_memory_of_a_gpu_follows_from_labels(draft: Drafts, labels: Manifest, gigabytes: float | None) -> None:
    multi = draft("prod-multi-gpu")
    select(multi, **labels)
    size = gpus.memory_bytes(multi.deployment)
    assert (size and round(size / 1e9, 2)) == gigabytes
