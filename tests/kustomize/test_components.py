"""What each component does to base, and that those which may meet get along."""

import itertools
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import yaml

from preflight.checks import knative


@pytest.fixture(scope="session")
def base(render_with, tree):
    return render_with(tree.base, tree.images)


@pytest.fixture
def added(render, tree):
    """Base with the component of that name."""
    return lambda name: render(tree.component(name))


def strangers(tree):
    """Pairs of components that do not go together, by what their READMEs say."""
    pairs = set()
    for folder in tree.components:
        said = re.findall(
            r"^Not with: (.+?)\n\n", (tree.root / folder / "README.md").read_text(), re.MULTILINE | re.DOTALL
        )
        pairs |= {frozenset((folder.name, other)) for other in re.findall(r"`([a-z0-9-]+)`", "".join(said))}
    return pairs


def test_readmes_agree_on_who_does_not_go_together(tree):
    names = {folder.name for folder in tree.components}
    for pair in strangers(tree):
        assert pair <= names, pair
        for name, other in itertools.permutations(pair):
            readme = (tree.kustomize / "components" / name / "README.md").read_text()
            assert f"`{other}`" in readme.partition("Not with:")[2], f"{name} does not mention {other}"


@pytest.mark.slow
def test_every_pair_that_makes_sense_renders_and_passes_preflight(tree, render_with, look):
    apart = strangers(tree)
    pairs = [
        (one, other)
        for one, other in itertools.combinations([each for each in tree.components if each != tree.images], 2)
        if frozenset((one.name, other.name)) not in apart
    ]
    assert len(pairs) > 100

    def wrong(pair):
        return [f"{pair}: {finding}" for finding in look(render_with(tree.base, *pair, tree.images))]

    with ThreadPoolExecutor() as pool:
        assert list(itertools.chain(*pool.map(wrong, pairs))) == []


def test_gpu(added):
    gpu = added("gpu")
    assert (
        gpu.server["resources"]["requests"]["nvidia.com/gpu"]
        == gpu.server["resources"]["limits"]["nvidia.com/gpu"]
        == "1"
    )
    assert {each["key"] for each in gpu.predictor["tolerations"]} == {"nvidia.com/gpu", "sku"}
    assert gpu.settings["PREDICTOR_DEVICE"] == "cuda"


def test_gpu_mig(added):
    limits = added("gpu-mig").server["resources"]["limits"]
    assert [name for name in limits if name.startswith("nvidia.com/")] == ["nvidia.com/mig-3g.40gb"]


def test_scale_to_zero(added, base):
    keys = {"window", "scale-to-zero-pod-retention-period", "initial-scale"}
    annotations = added("scale-to-zero").annotations
    assert {key for key in keys if f"autoscaling.knative.dev/{key}" in annotations} == keys
    assert annotations != base.annotations


def test_always_on(added):
    always_on = added("always-on")
    assert always_on.predictor["minReplicas"] == 1
    assert "autoscaling.knative.dev/scale-to-zero-pod-retention-period" not in always_on.annotations


@pytest.mark.parametrize("name", ["standard-mode", "autoscaling-hpa", "autoscaling-keda", "ingress"])
def test_what_is_for_standard_mode_brings_it(added, name):
    standard = added(name)
    assert not standard.is_knative
    assert standard.predictor["minReplicas"] == 1
    assert not [key for key in standard.annotations if "knative" in key]
    assert knative.flags(standard) == set()


def test_autoscaling_hpa(added):
    metrics = [each["resource"] for each in added("autoscaling-hpa").predictor["autoScaling"]["metrics"]]
    assert {each["name"]: each["target"]["averageUtilization"] for each in metrics} == {"cpu": 80, "memory": 80}


def test_knative_gives_a_replica_as_many_requests_as_it_decodes_together(base):
    running = int(base.settings["PREDICTOR_MAX_NUM_SEQS"])
    assert (base.predictor["scaleTarget"], base.predictor["containerConcurrency"]) == (running, running)


def test_autoscaling_keda_asks_for_three_quarters_of_a_batch(added):
    keda = added("autoscaling-keda")
    [metric] = keda.predictor["autoScaling"]["metrics"]
    assert int(metric["external"]["target"]["value"]) == 0.75 * int(keda.settings["PREDICTOR_MAX_NUM_SEQS"])
    assert 'kserve_llm_num_requests_waiting{model_name="llm"}' in metric["external"]["metric"]["query"]


def test_hf_token_is_a_new_job(added, base):
    assert added("hf-token").one("Job")["metadata"]["name"] != base.one("Job")["metadata"]["name"]


def test_init_container_downloads_instead_of_the_job(added, base):
    init = added("init-container")
    assert not init.all("Job")
    [(pod, container)] = init.downloads
    [(_, job)] = base.downloads
    assert pod == init.predictor_pod
    # KServe mounts nothing where this name is taken.
    assert container["name"] != "storage-initializer"
    for field in ("image", "args", "resources", "volumeMounts", "terminationMessagePolicy"):
        assert container[field] == job[field], field
    # Knative admits no security context of the pod, so the container says what the Job's pod says.
    assert container["securityContext"] == base.server["securityContext"]


def test_local_storage(added):
    local = added("local-storage")
    assert local.one("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert local.predictor["maxReplicas"] == 1


def test_offline_mirror_trusts_what_it_mounts(added):
    mirror = added("offline-mirror")
    told = mirror.environment(mirror.download)
    assert told["HF_ENDPOINT"] != "https://huggingface.co"
    [mount] = [each for each in mirror.download["volumeMounts"] if each["name"] == "ca"]
    assert told["SSL_CERT_FILE"] == f"{mount['mountPath']}/ca.crt"


def test_quantization_8bit(added):
    assert added("quantization-8bit").settings["PREDICTOR_QUANTIZATION"] == "8bit"


def test_prepared_8bit_is_another_job_in_the_image_with_torch(added, base):
    prepared = added("prepared-8bit")
    assert prepared.settings["PREDICTOR_QUANTIZATION"] == "8bit"
    assert prepared.one("Job")["metadata"]["name"] != base.one("Job")["metadata"]["name"]
    told = prepared.environment(prepared.download)
    assert told["STORAGE_INITIALIZER_PREPARE"] == "int8-cpu"
    assert told["OMP_NUM_THREADS"] == prepared.download["resources"]["limits"]["cpu"]
    assert prepared.download["image"] == told["DOWNLOAD_IMAGE"] == f"{base.download['image']}-prepare"


def test_api_keys_are_read_where_they_are_mounted(added):
    keys = added("api-keys")
    [mount] = [each for each in keys.server["volumeMounts"] if each["name"] == "api-keys"]
    assert keys.settings["PREDICTOR_API_KEYS_FILE"] == f"{mount['mountPath']}/keys"
    assert "subPath" not in mount


def test_tracing_is_on_and_lets_the_predictor_out_to_its_collector_alone(render_with, tree):
    tracing = render_with(tree.base, tree.component("network-policy"), tree.component("tracing"), tree.images)
    assert tracing.settings["PREDICTOR_TRACING"] == "true"
    policy = tracing.find("NetworkPolicy", "predictor")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert (
        policy["ingress"]
        == render_with(tree.base, tree.component("network-policy")).find("NetworkPolicy", "predictor")["spec"][
            "ingress"
        ]
    )
    [names, collector] = policy["egress"]
    assert names == {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
    [to], [port] = collector["to"], collector["ports"]
    namespace = to["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    endpoint = urlsplit(tracing.settings["OTEL_EXPORTER_OTLP_ENDPOINT"])
    assert (endpoint.hostname.partition(".")[2], endpoint.port) == (namespace, port["port"])


def test_tracing_adds_no_policy_where_there_is_none_and_leaves_the_collector_to_the_overlay(render_with, tree):
    endpoint = "http://collector.example.internal:4318"
    tracing = render_with(tree.base, tree.component("tracing"), tree.images, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    assert tracing.all("NetworkPolicy") == []
    assert tracing.settings["OTEL_EXPORTER_OTLP_ENDPOINT"] == endpoint


def test_tracing_before_the_policy_that_it_patches_is_noticed(render_with, tree, look):
    components = (tree.component(name) for name in ("tracing", "network-policy", "images"))
    [finding] = look(render_with(tree.base, *components))
    assert "list component tracing after network-policy" in finding


def test_ingress_is_the_only_one(added):
    ingress = added("ingress")
    assert ingress.service["metadata"]["labels"]["networking.kserve.io/visibility"] == "cluster-local"
    assert ingress.one("Ingress")["metadata"]["name"] != ingress.name


def test_canary(added):
    assert 0 < added("canary").predictor["canaryTrafficPercent"] < 100


def test_stop(added):
    assert added("stop").annotations["serving.kserve.io/stop"] == "true"


def test_images_replaces_every_image_of_the_manifests(base):
    images = [container["image"] for pod in base.pods for container in pod.containers]
    assert all(re.fullmatch(r"[\w.-]+\.\w+/[\w./-]+(:\d[\w.-]*|@sha256:[0-9a-f]{64})", image) for image in images)
    assert {each["imagePullPolicy"] for pod in base.pods for each in pod.containers} == {"IfNotPresent"}


def test_the_cluster_storage_container_is_ours_for_pinned_references_with_an_at(render, tree):
    spec = render(tree.storage_container).one("ClusterStorageContainer")["spec"]
    [uri_format] = spec["supportedUriFormats"]
    assert re.match(uri_format["regex"], f"hf://owner/model@{'a' * 40}")
    assert not re.match(uri_format["regex"], f"hf://owner/model:{'a' * 40}")
    # KServe gives the arguments, and finds the container by its name.
    assert "args" not in spec["container"]
    assert spec["container"]["name"] == "storage-initializer"
    assert ":" in spec["container"]["image"]


def test_monitoring_brings_monitor_rules_and_a_dashboard(added):
    monitoring = added("monitoring")
    [group, _] = monitoring.one("PrometheusRule")["spec"]["groups"]
    assert group["name"] == "kserve-llm-recording"
    [dashboard] = [each for each in monitoring.all("ConfigMap") if "grafana_dashboard" in each["metadata"]["labels"]]
    assert json.loads(dashboard["data"]["kserve-llm.json"])["title"] == "KServe LLM"


def test_prometheus_reads_the_predictor_always_and_the_queue_proxy_where_kserve_is_asked_to(added):
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


def test_prometheus_reads_the_predictor_and_may_list_pods_and_nothing_else(added):
    prometheus = added("prometheus")
    [config] = [each for each in prometheus.all("ConfigMap") if "prometheus.yml" in each.get("data", {})]
    [job] = yaml.safe_load(config["data"]["prometheus.yml"])["scrape_configs"]
    assert job["kubernetes_sd_configs"] == [{"role": "pod", "namespaces": {"own_namespace": True}}]
    [port] = [port["containerPort"] for port in prometheus.server["ports"]]
    assert f"$1:{port}" in [each.get("replacement") for each in job["relabel_configs"]]
    [rule] = prometheus.one("Role")["rules"]
    assert (rule["resources"], rule["verbs"]) == (["pods"], ["get", "list", "watch"])
    pod = prometheus.one("Deployment")["spec"]["template"]["spec"]
    assert config["metadata"]["name"] in [volume.get("configMap", {}).get("name") for volume in pod["volumes"]]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert re.fullmatch(r"docker\.io/prom/prometheus:v\d+\.\d+\.\d+", container["image"])


def test_promtool_takes_the_configuration_of_prometheus(tree, tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; it is in Debian's package prometheus")
    folder = tree.manifests / "prometheus"
    configuration = yaml.safe_load((folder / "prometheus.yml").read_text())
    # Debian's is built without Kubernetes' discovery.
    del configuration["scrape_configs"][0]["kubernetes_sd_configs"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    shutil.copy(folder / "rules.yaml", tmp_path)
    command = [promtool, "check", "config", tmp_path / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
