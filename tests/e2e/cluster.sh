#!/usr/bin/env bash
# Deploys overlay dev on kubectl's cluster, in the deployment mode of the first argument, with images that are loaded already. Sends a
# request, checks scaling, sends another one. For a disposable cluster with one node, as in .github/workflows/e2e.yaml.
set -euo pipefail
cd "$(dirname "$0")/../.."

mode=$1
namespace=kserve-llm-dev
question='{"inputs": [{"name": "messages", "datatype": "BYTES", "shape": [1],
  "data": ["[{\"role\": \"user\", \"content\": \"Say hello.\"}]"]}], "parameters": {"max_tokens": 8, "temperature": 0}}'

# Overlay dev with the images on the node, whatever component images says, and in Standard mode with Kubernetes' autoscaler. Image names
# without a registry belong to Docker Hub, for which KServe's installer disables Knative's tag resolution.
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

# In Knative mode the request goes through the gateway, and the activator starts the predictor; in Standard mode to the Service.
send_request() {
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
send_request

if [ "$mode" = knative ]; then
  echo "waiting for scale to zero"
  # The InferenceService's window and retention take six minutes; a terminating pod may still finish a request.
  for _ in $(seq 120); do
    [ "$(pods)" = 0 ] && break
    sleep 5
  done
  [ "$(pods)" = 0 ] || { echo "not at zero after ten minutes" >&2; exit 1; }
  send_request
else
  kubectl get hpa --namespace $namespace
  [ "$(kubectl get hpa --namespace $namespace --no-headers | wc --lines)" = 1 ] || { echo "no autoscaler" >&2; exit 1; }
fi
