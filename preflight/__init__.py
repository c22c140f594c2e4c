"""Check a kustomize overlay before it is applied to a cluster.

Covers Kubernetes, KServe and Knative objects. Of the two programs that they run, it uses only the settings.
"""
