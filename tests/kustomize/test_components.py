"""Effects of each component on base, and renderings of components that may be combined."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from devtools.paths import ROOT
from predictor.observability import metrics
from preflight.checks import knative
from preflight.checks.references import PODS_OF
from preflight.checks.schema import Schemas
from tests.kustomize.conftest import (
    BASE,
    COMPONENTS,
    IMAGES,
    MANIFESTS,
    STORAGE_CONTAINER,
    Preflight,
    Render,
    Rendered,
    RenderWith,
    component_folder,
)

Added = Callable[[str], Rendered]


@pytest.fixture(scope="session")
def base(render_with: RenderWith) -> Rendered:
    return render_with(BASE, IMAGES)


@pytest.fixture
def added(render: Render) -> Added:
    """Renders base with the component of a name."""
    return lambda name: render(component_folder(name))


# Combinations


def excluded(folder: Path) -> set[str]:
    """Names that follow "Not with:" in a component's README."""
    readme = (ROOT / folder / "README.md").read_text()
    sentences = re.findall(r"^Not with: (.+?)\n\n", readme, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([a-z0-9-]+)`", "".join(sentences)))


CONFLICTS = {frozenset((folder.name, name)) for folder in COMPONENTS for name in excluded(folder)}
PAIRS = [
    pair
    for pair in itertools.combinations([folder for folder in COMPONENTS if folder != IMAGES], 2)
    if frozenset(folder.name for folder in pair) not in CONFLICTS
]
"""Pairs of components that may be combined, in the order in which an overlay lists them."""


def clique_cover(pairs: list[tuple[Path, Path]]) -> list[tuple[Path, ...]]:
    """Sets of mutually compatible components that contain every pair, each grown greedily."""
    uncovered, sets = dict.fromkeys(pairs), []
    while uncovered:
        clique = list(next(iter(uncovered)))
        while True:
            candidates = {
                folder: sum(tuple(sorted((folder, member))) in uncovered for member in clique)
                for folder in COMPONENTS
                if all(tuple(sorted((folder, member))) in pairs for member in clique)
            }
            if not candidates:
                break
            clique.append(max(candidates, key=lambda folder: candidates[folder]))
        sets.append(tuple(sorted(clique)))
        for pair in itertools.combinations(sorted(clique), 2):
            uncovered.pop(pair, None)
    return sets


SETS = clique_cover(PAIRS)


def test_readmes_exclude_each_other_mutually() -> None:
    assert CONFLICTS
    names = {folder.name for folder in COMPONENTS}
    for conflict in CONFLICTS:
        assert conflict <= names, conflict
        for name, other in itertools.permutations(conflict):
            readme = (ROOT / component_folder(name) / "README.md").read_text()
            assert f"`{other}`" in readme.partition("Not with:")[2], f"{name} does not mention {other}"


def test_clique_cover_contains_every_pair_and_no_conflict() -> None:
    combined = {pair for folders in SETS for pair in itertools.combinations(folders, 2)}
    assert len(PAIRS) > 100
    assert combined == set(PAIRS)


@pytest.mark.parametrize("folders", SETS, ids=lambda folders: f"{folders[0].name}-and-{len(folders) - 1}-more")
def test_compatible_components_pass_preflight(
    render_with: RenderWith, preflight_findings: Preflight, folders: tuple[Path, ...]
) -> None:
    def findings(*components: Path) -> list[str]:
        return preflight_findings(render_with(BASE, *components, IMAGES))

    if found := findings(*folders):
        pairs = {pair: findings(*pair) for pair in itertools.combinations(folders, 2)}
        culprits = {f"{one.name} and {other.name}": of_pair for (one, other), of_pair in pairs.items() if of_pair}
        pytest.fail(f"{found}; by pair: {culprits or 'no pair alone fails'}")


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}-and-{pair[1].name}")
def test_compatible_pair_passes_preflight(
    render_with: RenderWith, preflight_findings: Preflight, pair: tuple[Path, Path]
) -> None:
    assert preflight_findings(render_with(BASE, *pair, IMAGES)) == []


# Single components


def test_gpu_sets_limits_tolerations_and_device(added: Added) -> None:
    gpu = added("gpu")
    assert (
        gpu.server["resources"]["requests"]["nvidia.com/gpu"]
        == gpu.server["resources"]["limits"]["nvidia.com/gpu"]
        == "1"
    )
    assert {item["key"] for item in gpu.predictor["tolerations"]} == {"nvidia.com/gpu", "sku"}
    assert gpu.settings["PREDICTOR_DEVICE"] == "cuda"


def test_gpu_mig_replaces_the_gpu_with_a_slice(added: Added) -> None:
    limits = added("gpu-mig").server["resources"]["limits"]
    assert [name for name in limits if name.startswith("nvidia.com/")] == ["nvidia.com/mig-3g.40gb"]


def test_pull_secret_is_in_every_service_account_and_nowhere_without_it(added: Added, base: Rendered) -> None:
    accounts = added("pull-secret").all("ServiceAccount")
    assert len(accounts) == 2
    assert [account["imagePullSecrets"] for account in accounts] == [[{"name": "registry-credentials"}]] * 2
    assert not [account for account in base.all("ServiceAccount") if "imagePullSecrets" in account]


def test_hold_while_loading_makes_pods_ready_before_the_model_and_leaves_time_to_answer(added: Added) -> None:
    settings = added("hold-while-loading").settings
    assert settings["PREDICTOR_READY_WHILE_LOADING"] == "true"
    assert 0 < float(settings["PREDICTOR_HOLD_WHILE_LOADING"]) < float(settings["PREDICTOR_REQUEST_TIMEOUT_SECONDS"])


def test_standard_mode_serves_on_after_sigterm_without_pre_stop(added: Added, base: Rendered) -> None:
    standard = added("standard-mode")
    assert standard.settings["PREDICTOR_SHUTDOWN_DELAY_SECONDS"] == "15"
    assert base.settings["PREDICTOR_SHUTDOWN_DELAY_SECONDS"] == "0", "the queue-proxy drains before SIGTERM"
    assert "lifecycle" not in standard.server


def test_scale_to_zero_sets_its_annotations(added: Added, base: Rendered) -> None:
    keys = {"window", "scale-to-zero-pod-retention-period", "initial-scale"}
    annotations = added("scale-to-zero").annotations
    assert {key for key in keys if f"autoscaling.knative.dev/{key}" in annotations} == keys
    assert annotations != base.annotations


def test_always_on_keeps_one_replica(added: Added) -> None:
    always_on = added("always-on")
    assert always_on.predictor["minReplicas"] == 1
    assert "autoscaling.knative.dev/scale-to-zero-pod-retention-period" not in always_on.annotations


@pytest.mark.parametrize("name", ["standard-mode", "autoscaling-hpa", "autoscaling-keda", "ingress", "inference-pool"])
def test_standard_mode_component_includes_standard_mode(added: Added, name: str) -> None:
    standard = added(name)
    assert not standard.is_knative
    assert standard.predictor["minReplicas"] == 1
    assert not [key for key in standard.annotations if "knative" in key]
    assert knative.flags(standard) == set()


def test_autoscaling_hpa_scales_on_cpu_and_memory(added: Added) -> None:
    metrics = [item["resource"] for item in added("autoscaling-hpa").predictor["autoScaling"]["metrics"]]
    assert {item["name"]: item["target"]["averageUtilization"] for item in metrics} == {"cpu": 80, "memory": 80}


def test_base_scale_target_equals_max_num_seqs(base: Rendered) -> None:
    running = int(base.settings["PREDICTOR_MAX_NUM_SEQS"])
    assert (base.predictor["scaleTarget"], base.predictor["containerConcurrency"]) == (running, running)


def test_autoscaling_keda_target_is_three_quarters_of_max_num_seqs(added: Added) -> None:
    keda = added("autoscaling-keda")
    [metric] = keda.predictor["autoScaling"]["metrics"]
    assert int(metric["external"]["target"]["value"]) == 0.75 * int(keda.settings["PREDICTOR_MAX_NUM_SEQS"])
    assert 'kserve_llm_num_requests_waiting{model_name="llm"}' in metric["external"]["metric"]["query"]


def test_hf_token_makes_a_new_job(added: Added, base: Rendered) -> None:
    assert added("hf-token").one("Job")["metadata"]["name"] != base.one("Job")["metadata"]["name"]


def test_init_container_replaces_the_job(added: Added, base: Rendered) -> None:
    init = added("init-container")
    assert not init.all("Job")
    [(pod, container)] = init.downloads
    [(_, job)] = base.downloads
    assert pod == init.predictor_pod
    # KServe mounts nothing into the predictor if this name is taken.
    assert container["name"] != "storage-initializer"
    for field in ("image", "args", "resources", "volumeMounts", "terminationMessagePolicy"):
        assert container[field] == job[field], field
    # Knative admits no pod security context, so the container repeats that of the Job's pod.
    assert container["securityContext"] == base.server["securityContext"]


def test_local_storage_has_one_replica(added: Added) -> None:
    local = added("local-storage")
    assert local.one("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert local.predictor["maxReplicas"] == 1


def test_offline_mirror_trusts_the_mounted_certificates(added: Added) -> None:
    mirror = added("offline-mirror")
    environment = mirror.environment(mirror.download)
    assert environment["HF_ENDPOINT"] != "https://huggingface.co"
    [mount] = [item for item in mirror.download["volumeMounts"] if item["name"] == "ca"]
    assert environment["SSL_CERT_FILE"] == f"{mount['mountPath']}/ca.crt"


def test_quantization_8bit_sets_the_quantization(added: Added) -> None:
    assert added("quantization-8bit").settings["PREDICTOR_QUANTIZATION"] == "8bit"


@pytest.mark.parametrize(
    ("name", "quantization", "variant"), [("prepared-8bit", "8bit", "int8-cpu"), ("prepared-4bit", "4bit", "int4-cpu")]
)
def test_prepared_makes_a_new_job_in_the_image_with_torch(
    added: Added, base: Rendered, name: str, quantization: str, variant: str
) -> None:
    prepared = added(name)
    assert prepared.settings["PREDICTOR_QUANTIZATION"] == quantization
    assert prepared.one("Job")["metadata"]["name"] != base.one("Job")["metadata"]["name"]
    environment = prepared.environment(prepared.download)
    assert environment["STORAGE_INITIALIZER_PREPARE"] == variant
    assert environment["OMP_NUM_THREADS"] == prepared.download["resources"]["limits"]["cpu"]
    assert prepared.download["image"] == environment["DOWNLOAD_IMAGE"] == f"{base.download['image']}-prepare"


def test_api_keys_file_is_in_the_mounted_directory(added: Added) -> None:
    keys = added("api-keys")
    [mount] = [item for item in keys.server["volumeMounts"] if item["name"] == "api-keys"]
    assert keys.settings["PREDICTOR_API_KEYS_FILE"] == f"{mount['mountPath']}/keys"
    assert "subPath" not in mount


def test_tracing_allows_egress_to_dns_and_its_collector_only(render_with: RenderWith) -> None:
    tracing = render_with(BASE, component_folder("network-policy"), component_folder("tracing"), IMAGES)
    assert tracing.settings["PREDICTOR_TRACING"] == "true"
    manifest = tracing.find("NetworkPolicy", "predictor")
    assert manifest
    policy = manifest["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    untraced = render_with(BASE, component_folder("network-policy")).find("NetworkPolicy", "predictor")
    assert untraced
    assert policy["ingress"] == untraced["spec"]["ingress"]
    [names, collector] = policy["egress"]
    assert names == {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
    [to], [port] = collector["to"], collector["ports"]
    namespace = to["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    endpoint = urlsplit(tracing.settings["OTEL_EXPORTER_OTLP_ENDPOINT"])
    assert endpoint.hostname
    assert (endpoint.hostname.partition(".")[2], endpoint.port) == (namespace, port["port"])


def test_tracing_without_network_policy_adds_none_and_keeps_the_overlay_endpoint(render_with: RenderWith) -> None:
    endpoint = "http://collector.example.internal:4318"
    tracing = render_with(BASE, component_folder("tracing"), IMAGES, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    assert tracing.all("NetworkPolicy") == []
    assert tracing.settings["OTEL_EXPORTER_OTLP_ENDPOINT"] == endpoint


def test_tracing_before_network_policy_is_a_finding(render_with: RenderWith, preflight_findings: Preflight) -> None:
    components = (component_folder(name) for name in ("tracing", "network-policy", "images"))
    [finding] = preflight_findings(render_with(BASE, *components))
    assert "list component tracing after network-policy" in finding


def test_ingress_disables_the_ingress_of_kserve(added: Added) -> None:
    ingress = added("ingress")
    assert ingress.service["metadata"]["labels"]["networking.kserve.io/visibility"] == "cluster-local"
    assert ingress.one("Ingress")["metadata"]["name"] != ingress.name


def test_canary_sets_a_percentage(added: Added) -> None:
    assert 0 < added("canary").predictor["canaryTrafficPercent"] < 100


def test_stop_sets_its_annotation(added: Added) -> None:
    assert added("stop").annotations["serving.kserve.io/stop"] == "true"


def test_images_replaces_every_image(base: Rendered) -> None:
    images = [container["image"] for pod in base.pods for container in pod.containers]
    assert all(re.fullmatch(r"[\w.-]+\.\w+/[\w./-]+(:\d[\w.-]*|@sha256:[0-9a-f]{64})", image) for image in images)
    assert {item["imagePullPolicy"] for pod in base.pods for item in pod.containers} == {"IfNotPresent"}


def test_cluster_storage_container_matches_only_references_with_an_at(render: Render) -> None:
    spec = render(STORAGE_CONTAINER).one("ClusterStorageContainer")["spec"]
    [uri_format] = spec["supportedUriFormats"]
    assert re.match(uri_format["regex"], f"hf://owner/model@{'a' * 40}")
    assert not re.match(uri_format["regex"], f"hf://owner/model:{'a' * 40}")
    # KServe sets the arguments, and selects the container by its name.
    assert "args" not in spec["container"]
    assert spec["container"]["name"] == "storage-initializer"
    assert ":" in spec["container"]["image"]


def test_monitoring_adds_monitor_rules_and_dashboard(added: Added) -> None:
    monitoring = added("monitoring")
    [group, _] = monitoring.one("PrometheusRule")["spec"]["groups"]
    assert group["name"] == "kserve-llm-recording"
    [dashboard] = [item for item in monitoring.all("ConfigMap") if "grafana_dashboard" in item["metadata"]["labels"]]
    assert json.loads(dashboard["data"]["kserve-llm.json"])["title"] == "KServe LLM"


def test_monitoring_scrapes_the_queue_proxy_only_with_its_annotation(added: Added) -> None:
    monitoring = added("monitoring")
    predictor, queue_proxy = monitoring.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    [port] = [port["containerPort"] for port in monitoring.server["ports"]]
    assert predictor["portNumber"] == port
    assert "relabelings" not in predictor
    assert queue_proxy["port"] == "http-usermetric"
    [kept] = queue_proxy["relabelings"]
    annotation = re.sub(r"\W", "_", "serving.kserve.io/enable-prometheus-scraping")
    assert kept["sourceLabels"] == [f"__meta_kubernetes_pod_annotation_{annotation}"]
    assert (kept["action"], kept["regex"]) == ("keep", "true")
    for prefix in ("prometheus.io", "prometheus.kserve.io"):
        assert monitoring.annotations[f"{prefix}/port"] == str(port)
        assert monitoring.annotations[f"{prefix}/path"] == predictor["path"]


def test_prometheus_scrapes_the_predictor_and_may_only_list_pods(added: Added) -> None:
    prometheus = added("prometheus")
    [config] = [item for item in prometheus.all("ConfigMap") if "prometheus.yml" in item.get("data", {})]
    [job] = yaml.safe_load(config["data"]["prometheus.yml"])["scrape_configs"]
    assert job["kubernetes_sd_configs"] == [{"role": "pod", "namespaces": {"own_namespace": True}}]
    [port] = [port["containerPort"] for port in prometheus.server["ports"]]
    assert f"$1:{port}" in [item.get("replacement") for item in job["relabel_configs"]]
    [rule] = prometheus.one("Role")["rules"]
    assert (rule["resources"], rule["verbs"]) == (["pods"], ["get", "list", "watch"])
    pod = prometheus.one("Deployment")["spec"]["template"]["spec"]
    assert config["metadata"]["name"] in [volume.get("configMap", {}).get("name") for volume in pod["volumes"]]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert re.fullmatch(r"docker\.io/prom/prometheus:v\d+\.\d+\.\d+", container["image"])


def test_inference_pool_selects_the_replicas_and_its_endpoint_picker(added: Added) -> None:
    inference_pool = added("inference-pool")
    pool = inference_pool.one("InferencePool")
    [port] = [port["containerPort"] for port in inference_pool.server["ports"]]
    assert pool["spec"]["targetPorts"] == [{"number": port}]
    assert pool["spec"]["selector"] == {"matchLabels": {PODS_OF: inference_pool.name}}
    service = inference_pool.find("Service", pool["spec"]["endpointPickerRef"]["name"])
    assert service
    assert pool["spec"]["endpointPickerRef"]["port"]["number"] in [item["port"] for item in service["spec"]["ports"]]


def test_inference_pool_readme_has_a_valid_route_to_the_pool(added: Added, schemas: Schemas) -> None:
    inference_pool = added("inference-pool")
    [text] = re.findall(r"```yaml\n(apiVersion.*?)```", inference_pool.readme, re.DOTALL)
    route = yaml.safe_load(text)
    assert schemas.problems(route) == []
    pool = inference_pool.one("InferencePool")
    group = pool["apiVersion"].partition("/")[0]
    [rule] = route["spec"]["rules"]
    assert rule["backendRefs"] == [{"group": group, "kind": pool["kind"], "name": pool["metadata"]["name"]}]
    assert rule["timeouts"]["request"] == f"{inference_pool.predictor['timeout']}s"


def test_inference_pool_endpoint_picker_reads_metrics_that_the_predictor_has(added: Added) -> None:
    flags = endpoint_picker_flags(added("inference-pool"))
    names = [flags["--total-queued-requests-metric"], flags["--kv-cache-usage-percentage-metric"]]
    assert set(names) <= {metrics.PREFIX + name for name in metrics.CallbackCollector.texts}
    # Empty: no metric of adapters is read.
    assert flags["--lora-info-metric"] == ""


def test_inference_pool_endpoint_picker_uses_plugins_that_are_configured(added: Added) -> None:
    inference_pool = added("inference-pool")
    [config] = [item for item in inference_pool.all("ConfigMap") if "config.yml" in item.get("data", {})]
    scheduling = yaml.safe_load(config["data"]["config.yml"])
    [profile] = scheduling["schedulingProfiles"]
    used = [plugin["pluginRef"] for plugin in profile["plugins"]]
    assert used == [plugin["type"] for plugin in scheduling["plugins"]]
    assert endpoint_picker_flags(inference_pool)["--config-file"].endswith("/config.yml")


def endpoint_picker_flags(rendered: Rendered) -> dict[str, str]:
    """Flags of the endpoint picker that are followed by a value."""
    [container] = rendered.one("Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(itertools.pairwise(container["args"]))


def test_prometheus_configuration_passes_promtool(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; it is in Debian's package prometheus")
    folder = MANIFESTS / "prometheus"
    configuration = yaml.safe_load((folder / "prometheus.yml").read_text())
    # Debian's is built without Kubernetes' discovery.
    del configuration["scrape_configs"][0]["kubernetes_sd_configs"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    shutil.copy(folder / "rules.yaml", tmp_path)
    command = [promtool, "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_adapter_gives_its_reference_to_the_job_and_the_predictor(added: Added, base: Rendered) -> None:
    adapter = added("adapter")
    reference = adapter.environment(adapter.download)["ADAPTER_REFERENCE"]
    assert adapter.settings["ADAPTER_REFERENCE"] == reference
    assert adapter.settings["MODEL_REFERENCE"] == base.settings["MODEL_REFERENCE"]
    assert adapter.one("Job")["metadata"]["name"] != base.one("Job")["metadata"]["name"]
