"""Looks over a kustomize overlay before the cluster sees it.

Knows Kubernetes, KServe and Knative objects; knows nothing of the two programs that they run but the names of a few of
their settings.
"""
