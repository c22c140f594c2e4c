#!/usr/bin/env bash
# Stops and deletes what an overlay has deployed; keeps its claim, with the weights, and its namespace unless the second argument is
# `delete`. `kubectl delete -k` deletes both, and takes minutes: Kubernetes looks at a namespace with running pods again only after half
# of their termination grace period.
set -euo pipefail

overlay=${1:-} claim=${2:-keep} timeout=${TIMEOUT:-15m}
case $claim in keep | delete) ;; *) overlay='' ;; esac
[ -n "$overlay" ] || { echo "usage: $0 OVERLAY [keep|delete]" >&2; exit 2; }

rendered=$(kubectl kustomize "$overlay")
print() { kubectl create --dry-run=client --validate=false --filename - --output "$1" <<< "$rendered"; }
template='{{if or (eq .kind "InferenceService") (eq .kind "RayService")}}{{.metadata.namespace}} {{.kind}} {{.metadata.name}}{{"\n"}}{{end}}'
read -r namespace kind service < <(print go-template="$template") || { echo "$overlay has no InferenceService or RayService" >&2; exit 1; }
kind=${kind,,}
names=$(print name)
mapfile -t claims < <(grep '^persistentvolumeclaim/' <<< "$names")
mapfile -t others < <(grep --invert-match --extended-regexp '^(namespace|persistentvolumeclaim)/' <<< "$names")
delete() { kubectl delete --namespace "$namespace" --ignore-not-found --timeout "$timeout" "$@"; }

if [ -n "$(kubectl get "$kind" "$service" --namespace "$namespace" --ignore-not-found --output name)" ]; then
  if [ "$kind" = inferenceservice ]; then
    # Running requests finish before the pods are gone. The service stays defined until then.
    kubectl annotate inferenceservice "$service" --namespace "$namespace" --overwrite serving.kserve.io/stop=true
    label=serving.kserve.io/inferenceservice
  else
    # KubeRay deletes the cluster at once.
    delete rayservice "$service"
    label=kserve-llm/rayservice
  fi
  kubectl wait pod --namespace "$namespace" --selector "$label=$service" --for=delete --timeout "$timeout"
fi

# In the foreground: a Job is gone when its pods are, which mount the claim.
delete --cascade=foreground "${others[@]}"

if [ "$claim" = keep ]; then
  echo "kept in namespace $namespace: ${claims[*]}, with the weights. To delete them: $0 $overlay delete"
  exit
fi
# A protected object (manifests/cluster/deletion-protection) has this label.
unprotect() { kubectl label --namespace "$namespace" "$@" kserve-llm/deletion-; }
for name in "${claims[@]}"; do
  if [ -n "$(kubectl get "$name" --namespace "$namespace" --ignore-not-found --output name)" ]; then
    unprotect "$name"
    delete "$name"
  fi
done
grep --quiet "^namespace/$namespace$" <<< "$names" || exit 0
rest=$(kubectl get "$kind,persistentvolumeclaims" --namespace "$namespace" --output name)
if [ -n "$rest" ]; then
  echo "kept: namespace/$namespace, which also contains ${rest//$'\n'/, }"
elif [ -n "$(kubectl get namespace "$namespace" --ignore-not-found --output name)" ]; then
  unprotect "namespace/$namespace"
  delete "namespace/$namespace"
fi
