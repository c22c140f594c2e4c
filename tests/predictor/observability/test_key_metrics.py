from prometheus_client import REGISTRY

from predictor.observability.key_metrics import MAX_NAMES, KeyMetrics


def test_names_of_keys_beyond_the_maximum_are_counted_together() -> None:
    metrics = KeyMetrics("many-keys")
    for number in range(MAX_NAMES + 50):
        metrics.count_rejected(f"key-{number}", "queue")
    metrics.count_rejected("key-0", "queue")
    counts = {
        sample.labels["key"]: sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == "kserve_llm_key_request_rejected_total" and sample.labels["model_name"] == "many-keys"
    }
    assert len(counts) == MAX_NAMES + 1
    assert (counts["key-0"], counts["other"]) == (2, 50)
