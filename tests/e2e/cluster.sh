#!/usr/bin/env bash
# Overlay dev on the cluster that kubectl talks to, in the mode of the first argument, with images of ours that are already there:
# deployed, asked, scaled, asked again. For a cluster of one node that may be thrown away: .github/workflows/e2e.yaml makes one.
set -euo pipefail
cd "$(dirname "$0")/../.."

mode=$1
namespace=kserve-llm-dev
question='{"inputs": [{"name": "messages", "datatype": "BYTES", "shape": [1],
  "data": ["[{\"role\": \"user\", \"content\": \"Say hello.\"}]"]}], "parameters": {"max_tokens": 8, "temperature": 0}}'

# The overlay below is dev with images that are on the node, whatever component images names, and in Standard mode with Kubernetes' own
# autoscaler. Without a registry their names are Docker Hub's: KServe's installer has Knative ask every other one for a tag's digest.
overlay=$(mktemp --directory kustomize/overlays/e2e.XXXXXX)
trap 'rm -rf "$overlay"' EXIT
case $mode in
  knative) components='' ;;
  standard) components='components: [../../components/autoscaling-hpa]' ;;
  *) echo "usage: $0 knative|standard" >&2; exit 2 ;;
esac
cat > "$overlay/kustomization.yaml" <<YAML
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../dev]
$components
patches:
  - target: {kind: ServingRuntime}
    patch: |-
      - {op: replace, path: /spec/containers/0/image, value: kserve-llm-predictor:dev}
  - target: {kind: Job}
    patch: |-
      - {op: replace, path: /spec/template/spec/containers/0/image, value: kserve-llm-storage-initializer:dev}
YAML

selector=serving.kserve.io/inferenceservice=llm
pods() { kubectl get pods --namespace $namespace --selector $selector --no-headers 2> /dev/null | wc --lines; }

# In Knative mode the question goes through the gateway, whose activator wakes the predictor; in Standard mode to its Service.
ask() {
  local url host=() target=(--namespace "$namespace" service/llm-predictor)
  if [ "$mode" = knative ]; then
    url=$(kubectl get inferenceservice llm --namespace $namespace --output jsonpath='{.status.url}')
    host=(--header "Host: ${url#*://}")
    target=(--namespace istio-system service/istio-ingressgateway)
  fi
  kubectl port-forward "${target[@]}" 8000:80 > /dev/null &
  local forward=$!
  curl --fail --silent --show-error --retry 30 --retry-connrefused --retry-delay 1 --max-time 600 "${host[@]}" \
    --header 'Content-Type: application/json' --data "$question" http://127.0.0.1:8000/v2/models/llm/infer
  echo
  kill $forward
}

kubectl apply --kustomize "$overlay"
kubectl wait --namespace $namespace --for=condition=Complete --timeout=600s job --all
kubectl wait --namespace $namespace --for=condition=Ready --timeout=900s inferenceservice/llm
ask

if [ "$mode" = knative ]; then
  echo "waiting for the last pod to leave"
  # Window and retention of the InferenceService are six minutes; what then terminates may still finish a request.
  for _ in $(seq 120); do
    [ "$(pods)" = 0 ] && break
    sleep 5
  done
  [ "$(pods)" = 0 ] || { echo "still there after ten minutes" >&2; exit 1; }
  ask
else
  kubectl get hpa --namespace $namespace
  [ "$(kubectl get hpa --namespace $namespace --no-headers | wc --lines)" = 1 ] || { echo "no autoscaler" >&2; exit 1; }
fi
